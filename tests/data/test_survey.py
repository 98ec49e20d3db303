"""What a store holds, counted, and what a stage draws, against what the loader gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moba_train.config import MixConfig
from moba_train.data.mix import build_mix
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.data.survey import LONG, describe_draws, holdings, source_draws


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    writer = StoreWriter(tmp_path / "store", vocab_size=100, shard_bytes=1 << 30)
    for source, length in [(0, 8 << 10), (0, (8 << 10) - 1), (0, 1), (1, 40_000), (1, 7)]:
        writer.add([np.full(length, source, np.uint16)], source)
    writer.close_shard({})
    writer.finish({"eos_id": 0, "sources": [{"name": "a"}, {"name": "b"}]})
    return TokenStore.open(tmp_path / "store")


def test_holdings(store: TokenStore) -> None:
    a, b, both = holdings(store)
    assert (a.name, a.documents, a.tokens, a.median, a.longest) == ("a", 3, 16384, 8191, 8192)
    assert a.long_shares == (0.5, 0, 0, 0) and len(LONG) == 4
    assert b.long_shares[:2] == (40_000 / 40_007, 40_000 / 40_007)
    assert (both.name, both.documents, both.tokens) == ("all", 5, store.tokens)
    assert both.documents_by_bin.tolist() == [1, 0, 1, *[0] * 9, 1, 1, 0, 1]  # of 1, 4-7, 4K-8K, 8K-16K, 32K-64K
    assert both.tokens_by_bin[[0, 2, 12, 13, 15]].tolist() == [1, 7, 8191, 8192, 40_000]
    assert (a.tokens_by_bin + b.tokens_by_bin == both.tokens_by_bin).all()


def test_source_draws_are_what_is_drawn(store: TokenStore) -> None:
    mix = build_mix(store, 1000, 0, MixConfig(weights={"a": 1.0, "b": 4.0}))
    a, b = source_draws(store, mix, rows=500)
    drawn: Counter[int] = Counter()
    for row in mix.draw(0, 500):
        for span in range(mix.rows.offsets[row], mix.rows.offsets[row + 1]):
            drawn[int(store.sources[mix.rows.documents[span]])] += int(mix.rows.lengths[span])
    assert (a.share, b.share) == (pytest.approx(0.2), pytest.approx(0.8))
    assert (a.tokens, b.tokens) == (pytest.approx(drawn[0], rel=0.03), pytest.approx(drawn[1], rel=0.03))
    assert (a.epochs, b.epochs) == (pytest.approx(a.tokens / 16384), pytest.approx(b.tokens / 40_007))
    assert describe_draws([a, b]) == "a 20 % (5.9 epochs), b 80 % (9.7 epochs)"
