"""Sequence parallelism: what ranks with slices of rows compute is what one rank computes from the rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train import resolved
from moba_train.batch import count_positions, model_inputs, valid_tokens
from moba_train.config import Config, LaunchConfig, SourceConfig
from moba_train.data.loader import Batch
from moba_train.data.tokens import prepare_store
from moba_train.loss import IGNORE
from moba_train.metrics import PositionLoss
from moba_train.parallel.sequence import _Moved
from moba_train.runtime import Runtime, start
from tiny import run_ranks


def rank_of(rank: int, world_size: int, sequence_parallel_size: int) -> Runtime:
    return Runtime(rank, world_size, rank, torch.device("cpu"), sequence_parallel_size)


def test_ranks_of_a_group_are_neighbours() -> None:
    ranks = [rank_of(rank, 4, 2) for rank in range(4)]
    assert [(r.data_parallel_rank, r.sequence_parallel_rank) for r in ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {r.data_parallel_size for r in ranks} == {2}
    alone = rank_of(3, 4, 1)
    assert (alone.data_parallel_rank, alone.data_parallel_size, alone.sequence_parallel_rank) == (3, 4, 0)


def test_started_ranks_make_whole_groups(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"sequence_parallel_size=2 does not divide WORLD_SIZE=3: .* multiple of 2"):
        start(LaunchConfig(), 2)


def batch_of(lengths: list[list[int]], length: int) -> Batch:
    """Rows of segments of these lengths; what is left of a row is padding."""
    rows, bounds = len(lengths), [0]
    positions = torch.zeros(rows, length, dtype=torch.int64)
    labels = torch.full((rows, length), IGNORE)
    for row, segments in enumerate(lengths):
        at = 0
        for size in segments:
            positions[row, at : at + size] = torch.arange(size)
            labels[row, at + 1 : at + size] = torch.arange(at + 1, at + size)
            at += size
            bounds.append(row * length + at)
        if at < length:
            positions[row, at:] = torch.arange(length - at)
            bounds.append((row + 1) * length)
    return Batch(torch.arange(rows * length).view(rows, length), labels, positions, torch.tensor(bounds), length)


@pytest.mark.parametrize("size", [2, 4])
def test_slices_make_up_the_rows(size: int) -> None:
    """Their targets too, which a shift of each slice would lose at the cuts, and what is counted of them."""
    batch = batch_of([[64], [5, 28, 20]], 64)
    whole = model_inputs(batch, rank_of(0, 1, 1))
    slices = [model_inputs(batch, rank_of(rank, size, size)) for rank in range(size)]
    for name in ("input_ids", "targets", "position_ids"):
        assert all(part[name].is_contiguous() and part[name].shape == (2, 64 // size) for part in slices)
        assert torch.equal(torch.cat([part[name] for part in slices], dim=1), whole[name])
    assert all(torch.equal(part["cu_seq_lens_q"], batch.cu_seqlens) and part["max_length_q"] == 64 for part in slices)

    losses = torch.rand(2, 64)
    expected, bins = PositionLoss(64, 16), PositionLoss(64, 16)
    count_positions(expected, losses, whole, batch)
    for part, of_slice in zip(slices, losses.chunk(size, dim=1), strict=True):
        count_positions(bins, of_slice, part, batch)
    assert bins.as_row("x", curve=True) == pytest.approx(expected.as_row("x", curve=True))
    assert float(bins._state[1, :4].sum()) == valid_tokens(batch)
    assert float(bins._state[1, 4]) == 16, "only the row that is one whole segment has a trailing loss"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("numbers", "beside", "first"),
    [(8, 8, 0), (7, 7, 0), (8, 1, 0), (8, 8, 1)],
    ids=["words of 8 bytes", "numbers", "tokens between words", "a start between words"],
)
def test_parcels_are_copied_in_order(dtype: torch.dtype, numbers: int, beside: int, first: int) -> None:
    """Of what a fused projection gives, which is not contiguous; and back, for the gradient."""
    projected = torch.randn(3, 2, 4, numbers + beside, dtype=dtype)
    slices = projected[..., first : first + numbers].requires_grad_()
    parcels = _Moved.apply(slices, 2, 0)
    assert torch.equal(parcels, slices.movedim(2, 0)) and parcels.is_contiguous()
    gradient = torch.randn_like(parcels)
    assert torch.equal(torch.autograd.grad(parcels, slices, gradient)[0], gradient.movedim(0, 2))


def case(name: str, size: int, zero_stage: int, kv_heads: int = 2, **train) -> dict:
    return {
        "name": name,
        "train": {"sequence_parallel_size": size, "zero_stage": zero_stage, **train},
        "kv_heads": kv_heads,
    }


# One start for each number of ranks. Heads are 4, so 2 kv heads are fewer than 4 ranks, and 1 is fewer than 2.
CASES = {
    1: [case(f"{kv_heads} kv heads", 1, 0, kv_heads) for kv_heads in (1, 2, 4)],
    2: [
        *(case(f"2 ranks, ZeRO {stage}", 2, stage) for stage in (0, 1, 2, 3)),
        case("2 ranks, 1 kv head", 2, 0, 1),
        case("2 ranks, checkpointed, ZeRO 3", 2, 3, 4, activation_checkpointing=True),
        case(
            "2 ranks, tiled, ZeRO 3", 2, 3, 4, activation_checkpointing=True, keep_attention=True, mlp_tile_tokens=100
        ),
        case(
            "2 ranks, tiled, attention kept, ZeRO 1",
            2,
            1,
            4,
            activation_checkpointing=True,
            keep_attention=True,
            mlp_tile_tokens=50,
        ),
    ],
    4: [
        *(case(f"4 ranks, ZeRO {stage}", 4, stage) for stage in (0, 1, 2, 3)),
        case("4 ranks, checkpointed, 1 kv head", 4, 2, 1, activation_checkpointing=True),
        *(case(f"2 x 2 ranks, ZeRO {stage}", 2, stage) for stage in (0, 1, 2, 3)),
    ],
}


Facts = Callable[[int, str], dict]


@pytest.fixture(scope="module")
def facts(tiny_config_module: Config, tiny_corpus: Path, tmp_path_factory) -> Facts:
    folder = tmp_path_factory.mktemp("facts")
    return facts_of(packed(tiny_config_module, tiny_corpus, folder), folder, CASES)


def facts_of(
    config: Config, folder: Path, cases: dict[int, list[dict]], run: Callable[[Path, list[str], int], Any] = run_ranks
) -> Facts:
    """Facts of a case; all cases of a number of ranks come from one start, by ``run``."""
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    prepare_store(config.data, str(config.model.tokenizer), progress=False)
    script = Path(__file__).with_name("sequence_facts.py")

    def get(ranks: int, name: str) -> dict:
        if not (folder / f"{name}.pt").exists():
            arguments = [str(folder / resolved.FILE), json.dumps(cases[ranks]), str(folder)]
            run(script, arguments, ranks)
        return torch.load(folder / f"{name}.pt")

    return get


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "name", "kv_heads"),
    [(ranks, one["name"], one["kv_heads"]) for ranks in (2, 4) for one in CASES[ranks]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_slices_give_the_losses_and_gradients_of_whole_rows(facts: Facts, ranks: int, name: str, kv_heads: int) -> None:
    assert_same(facts(ranks, name), facts(1, f"{kv_heads} kv heads"), loss=1e-6, gradients=2e-6)


def assert_same(sliced: dict, whole: dict, loss: float, gradients: float) -> None:
    """
    Args:
        loss: the largest relative difference of a loss, or of anything else that a step reports.
        gradients: the largest difference of a gradient's number, relative to the largest one of its parameter.
    """
    assert sliced["tokens"] == whole["tokens"] == 2 * 512
    for stage, expected in whole["stages"].items():
        got = sliced["stages"][stage]
        assert max(expected["segments"]) > 3 and min(expected["segments"]) == 1, "packed rows and whole ones"
        assert "train/trailing_loss" in expected["row"] and len(expected["row"]) > 6
        assert got["row"] == pytest.approx(expected["row"], rel=loss)
        assert got["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            error = (got["gradients"][parameter] - gradient).abs().max()
            assert error <= gradients * gradient.abs().max(), f"{parameter} in stage {stage}"
    assert len(whole["heldout"]) == len(sliced["heldout"]) == 2
    for row, expected in zip(sliced["heldout"], whole["heldout"], strict=True):
        losses = {key: value for key, value in expected.items() if key.startswith("eval/") and key != "eval/point"}
        assert len(losses) > 9
        assert {key: row[key] for key in losses} == pytest.approx(losses, rel=loss)


def packed(base: Config, corpus: Path, folder: Path) -> Config:
    """The tiny run on documents of which a step's rows hold several, and one that fills rows."""
    config = copy.deepcopy(base)
    words = (corpus / "train/a.txt").read_text().split()
    (folder / "documents").mkdir()
    for index, size in enumerate([900, *(7 + 5 * i % 60 for i in range(60))]):
        text = " ".join(words[index * 13 :][:size]) if index else " ".join(words[:size])
        (folder / "documents" / f"{index:03d}.txt").write_text(text)
    config.data.train = [SourceConfig(name="train", path=str(folder / "documents"))]
    config.data.store_dir = str(folder / "store")
    config.position_loss.log_every = 1
    config.train.micro_batch_tokens = 256  # two rows of the first stage in a pass
    return config
