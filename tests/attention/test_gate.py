from __future__ import annotations

import pytest
import torch

from attention.cases import CASES, DEVICES, Case
from moba_train.attention import AttentionSpec, gate
from moba_train.attention.blocks import cut
from moba_train.attention.gate import choose, exact_matmul


def chosen(query, key, lengths, block_size, top_k):
    cu_seqlens = torch.tensor([0, *lengths], device=query.device).cumsum(0).int()
    blocks = cut(cu_seqlens, block_size, len(query))
    return choose(query, key, blocks, AttentionSpec("moba", block_size, top_k))


def by_definition(query, key, lengths, block_size, top_k):
    """Lists of blocks, best first, from fp64 scores, one query and head at a time."""
    query, key = query.double().cpu(), key.double().cpu()
    group = query.shape[1] // key.shape[1]
    rows, start, first = [], 0, 0
    for length in lengths:
        for t in range(length):
            own = t // block_size
            for h in range(query.shape[1]):
                keys = key[start : start + own * block_size, h // group].unflatten(0, (own, block_size))
                scores = (keys.mean(1) @ query[start + t, h]).tolist()
                best = sorted(range(own), key=lambda n: (-scores[n], n))[: top_k - 1]
                rows.append([first + n for n in best] + [-1] * (top_k - 1 - len(best)))
        start += length
        first += -(-length // block_size)
    return torch.tensor(rows).view(*query.shape[:2], top_k - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_choices_are_the_definition(case, device):
    query, key, _, _ = case.tensors(device)
    found = chosen(query, key, case.lengths, case.block_size, case.top_k)
    assert found.dtype == torch.int16
    assert torch.equal(found.long().cpu(), by_definition(query, key, case.lengths, case.block_size, case.top_k))


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_change_nothing(device, monkeypatch):
    case = Case("tiled", (130, 1, 0, 75))
    query, key, _, _ = case.tensors(device)
    whole = chosen(query, key, case.lengths, 16, 4)
    sizes, scores_of = [], gate._scores
    monkeypatch.setattr(gate, "_scores", lambda *given: sizes.append((s := scores_of(*given)).numel()) or s)
    for scores in (1, 700, 5000):
        monkeypatch.setitem(gate.TILE_SCORES, device, scores)
        assert torch.equal(chosen(query, key, case.lengths, 16, 4), whole)
        one_query = 4 * 20  # heads x blocks, and room for more of them on a GPU
        assert max(sizes) <= max(scores, one_query) and len(sizes) > 1
        sizes.clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [2, 4, 9])
def test_equal_scores_go_to_the_earlier_block(device, top_k):
    """All keys equal: every earlier block scores the same, and the first ones win in their order."""
    query, key = torch.randn(160, 2, 8, device=device), torch.ones(160, 1, 8, device=device)
    found = chosen(query, key, (160,), 16, top_k)
    for token in range(160):
        row = [n if n < token // 16 else -1 for n in range(top_k - 1)]
        assert found[token].tolist() == [row, row]


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_of_equal_blocks_keep_their_order(device):
    """Blocks 0 and 3, 1 and 4, 2 and 5 hold the same keys, so their scores tie exactly."""
    half = torch.randn(48, 2, 8, device=device)
    key = torch.cat((half, half, half[:16]))
    query = torch.randn(112, 4, 8, device=device)
    found = chosen(query, key, (112,), 16, 7)
    last = found[96:].long()  # these choose among all six
    at = torch.empty_like(last).scatter_(-1, last, torch.arange(6, device=device).expand_as(last))
    assert (at[..., :3] + 1 == at[..., 3:]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_fp32_whatever_the_surroundings(device):
    """Two blocks whose scores differ by less than bf16 or TF32 can tell."""
    key = torch.zeros(12, 1, 4, device=device)
    key[0:4, :, 0], key[4:8, :, 0] = 1.0, 1.0 + 2**-14
    query = torch.ones(12, 1, 4, device=device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            found = chosen(query, key, (12,), 4, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert found[8:].flatten().tolist() == [1] * 4


def test_means_of_half_precision_keys_are_fp32():
    """In bf16 the sum of 512 ones and a small number would lose the small number."""
    key = torch.ones(1536, 1, 2, dtype=torch.bfloat16)
    key[512, 0, 0] = 1.0078125  # the next bf16 above 1
    query = torch.ones(1536, 1, 2, dtype=torch.bfloat16)
    assert (chosen(query, key, (1536,), 512, 2)[1024:] == 1).all()


def test_many_blocks_need_wider_indices():
    query = key = torch.randn(40000, 1, 2)
    found = chosen(query, key, (20, *[39980 // 20] * 20), 1, 2)
    assert found.dtype == torch.int32
    assert int(found.max()) > 1 << 15


def test_choices_carry_no_gradient():
    query, key, _, _ = Case("gradient", (40,)).tensors()
    assert not chosen(query.requires_grad_(), key.requires_grad_(), (40,), 16, 2).requires_grad


def test_products_are_exact_whatever_surrounds_the_gate():
    """Of a CPU without bf16 matrix units the result would not tell."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu"), exact_matmul(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
