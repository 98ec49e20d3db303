"""The gate's selection on a Hopper GPU: its own kernel chooses what Triton's does, whatever the scores are."""

from __future__ import annotations

import pytest
import torch

from attention.cases import Case, exact_choices
from moba_train.attention.blocks import Blocks, cut

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]

CASES = [
    Case("one_block", (16,), 1, 1, 128, 16, 8),
    Case("fewer_blocks_than_choices", (70, 9), 2, 1, 128, 16, 9),
    Case("many_short_documents", (77, 1, 0, 900, 2300, 5, 64, 1, 1), 4, 4, 128, 16, 8),
    Case("one_choice", (3001,), 8, 1, 128, 16, 2),
    Case("group_of_four", (5000, 3333), 8, 2, 64, 16, 5),
    Case("group_of_eight", (4099,), 8, 1, 128, 16, 8),
    Case("group_of_three", (2050, 77), 9, 3, 64, 32, 6),
    Case("eleven_choices", (5000, 900), 8, 2, 128, 16, 12),
    Case("most_choices", (3000, 200, 100), 2, 2, 64, 16, 17),
    Case("more_items_than_programs", (9000, 40, 11_000), 16, 4, 128, 16, 8),
    Case("thousands_of_blocks", (70_001, 61_000), 1, 1, 128, 16, 8),
]


def inputs(case: Case, dtype: torch.dtype, what: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Blocks]:
    """query, and the representatives high and low, with scores of a kind."""
    query = case.tensors("cuda", dtype)[0]
    blocks = cut(case.cu_seqlens("cuda"), case.block_size, len(query))
    generator = torch.Generator("cuda").manual_seed(1)
    shape = case.kv_heads, len(blocks.first), case.head_dim
    means = torch.randn(shape, device="cuda", generator=generator) * case.block_size**-0.5
    if what == "offset":  # large scores, close to each other: some are equal
        query[:, :, 0], means[:, :, 0] = 3, 100
    high = means.to(dtype)
    low = (means - high.float()).to(dtype)
    if what == "equal":
        high[:, ::2], low[:, ::2] = high[:, :1].clone(), low[:, :1].clone()
    if what == "zero":
        query[::3] = 0
    if what == "nan":
        query[::5], high[:, ::7, 3] = torch.nan, torch.nan
    if what == "nan_columns":  # of all tiles the same
        high[:, 3::8] = torch.nan
    if what == "rising":  # every block is better than those before it
        query[:] = 1
        high += torch.arange(shape[1], device="cuda")[None, :, None] / 64
    if what == "infinite":
        query[::5, :, 0] = torch.inf
    return query, high, low, blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_choices_are_those_of_triton_s_kernel(case, dtype, monkeypatch):
    from moba_train.attention.kernels import hopper, select

    choose = case.spec.moba[1] - 1
    for what in ("random", "offset", "equal", "zero", "nan", "nan_columns", "infinite", "rising"):
        query, high, low, blocks = inputs(case, dtype, what)
        arguments = (query, high, low, blocks, case.block_size, choose)
        with monkeypatch.context() as patch:
            patch.setattr(select, "on_hopper", lambda *_: None)
            expected = select.select(*arguments)
        assert select._tuned(query, high, low, choose) is hopper.select
        found = select.select(*arguments)
        assert torch.equal(found.sort(-1).values, expected.sort(-1).values), what
        if choose <= len(blocks.first) <= 1024 and what in ("equal", "zero", "nan", "nan_columns"):
            none = torch.iinfo(found.dtype).max
            exact = exact_choices(query, high, low, blocks, choose)
            wrong = (torch.where(found == none, -1, found.int()).sort(-1).values != exact).any(-1)
            # Two scores within rounding of each other may change places: Triton's products add in another order.
            assert wrong.sum() <= 2 + wrong.numel() // 10_000, what


def test_it_serves_what_it_has_tiles_and_registers_for():
    from moba_train.attention.kernels import hopper, select

    for head_dim, choose, served in [(128, 7, True), (64, 16, True), (96, 7, False), (128, 17, False)]:
        query, high = (torch.empty(1, 1, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        assert (select._tuned(query, high, high, choose) is hopper.select) == served
