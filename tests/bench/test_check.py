"""Do the checks tell right from wrong, with and without log-sum-exps, at short tails and with several sequences?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moba_train.attention.blocks import cut
from moba_train.attention.gate import choose
from moba_train.attention.reference import reference
from moba_train.attention.varlen import varlen_moba
from moba_train.bench import check
from moba_train.bench.cases import Case
from moba_train.bench.check import CheckFailed, Results
from moba_train.bench.compare import compare
from moba_train.bench.implementations import dense, judge, judge_dense, moba, results

CPU = torch.device("cpu")
CASE = Case("check", 2, 151, 4, 2, 16, 3, 32, "fp32")
PARTS = ("out", "d_query", "d_key", "d_value")


@pytest.fixture(autouse=True)
def _more_samples(monkeypatch) -> None:
    monkeypatch.setattr(check, "ROWS", 400)
    monkeypatch.setattr(check, "BLOCKS", 20)


def right(case: Case = CASE) -> tuple[list[torch.Tensor], Results]:
    tensors = case.tensors(CPU)
    return tensors, results(moba("reference", case, CPU), tensors)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["varlen", "reference", "dense"])
def test_a_wrong_part_is_named(kind: str, part: str) -> None:
    tensors, found = right()
    if kind == "dense":
        found = results(dense(CASE, None), tensors)

    def verdict(given: Results) -> str:
        judged = judge_dense(CASE, tensors, given) if kind == "dense" else judge(kind, CASE, tensors, given)
        return judged.verdict()

    assert part in verdict(found)
    for wrong in (getattr(found, part) * 1.02, torch.full_like(getattr(found, part), torch.nan)):
        with pytest.raises(CheckFailed, match=f"{part} is off" if part != "out" else "is off"):
            verdict(replace(found, **{part: wrong}))


def test_rounding_of_short_rows_is_no_error() -> None:
    """A block's second token in bf16: its dQ is a tenth of others', and the rounding of its output is not."""
    case = replace(CASE, sequences=1, length=64, heads=6, dtype="bf16")
    tensors = case.tensors(CPU)
    found = results(moba("varlen", case, CPU), tensors)
    assert "d_query" in judge("varlen", case, tensors, found).verdict()


def test_a_wrong_choice_is_named() -> None:
    tensors, found = right()
    judged = judge("varlen", CASE, tensors, found)
    judged.choices = judged.choices.clone()
    judged.choices[140:151, :, 0] = (judged.choices[140:151, :, 0] + 1) % 3
    with pytest.raises(CheckFailed, match="gate"):
        judged.verdict()
    judged.choices[:, :, 1] = -1  # too few
    with pytest.raises(CheckFailed, match="gate is off by inf"):
        judged.verdict()


def test_log_sum_exps_are_used_where_they_are_given() -> None:
    tensors, found = right()
    judged = judge("varlen", CASE, tensors, found)
    assert judged.lse is not None and judge("reference", CASE, tensors, found).lse is None
    judged.lse = judged.lse + 0.1
    with pytest.raises(CheckFailed, match="d_"):
        judged.verdict()


def test_gradients_that_cannot_be_looked_at_are_not_called_right(monkeypatch) -> None:
    tensors, found = right()
    monkeypatch.setattr(check, "MOST_GATHERED", {"cpu": 1})
    with pytest.raises(CheckFailed, match="few enough readers"):
        judge("reference", CASE, tensors, found).verdict()


def test_comparison_with_checked_results() -> None:
    tensors, found = right()
    half = results(
        moba("reference", CASE, CPU), [x.detach().bfloat16().requires_grad_(i < 3) for i, x in enumerate(tensors)]
    )
    assert compare(half, half).startswith("0.00% of the rows")
    assert compare(found, found).startswith("0.00% of the rows")
    for part in PARTS:
        with pytest.raises(CheckFailed, match=part):
            compare(replace(found, **{part: getattr(found, part) * 1.5}), found)
        broken = getattr(found, part).clone()
        broken[-1, -1, -1] = torch.nan
        with pytest.raises(CheckFailed, match=f"{part} is not finite"):
            compare(replace(found, **{part: broken}), found)


def test_a_few_rows_may_choose_otherwise_and_explain_what_follows() -> None:
    """Exact attention after a gate that takes another block for some rows."""
    case = Case("rows", 1, 1024, 4, 2, 64, 3, 32, "fp32")
    tensors, found = right(case)
    blocks = cut(case.cu_seqlens(CPU), 64, 1024)
    choices = choose(tensors[0].detach(), tensors[1].detach(), blocks, case.spec)

    def some(share: float) -> Results:
        changed = choices.clone()
        rows = torch.rand(changed.shape[:2], generator=torch.Generator().manual_seed(2)) < share
        rows[:256] = False  # they read all that they may
        worst = torch.where(changed == 0, 1, 0).amin(-1)  # block 0, or 1 where 0 is chosen already
        changed[..., -1] = torch.where(rows, worst, changed[..., -1])
        return results(lambda q, k, v: varlen_moba(q, k, v, changed, blocks.bounds, 64, case.scale)[0], tensors)

    assert "of the rows chose otherwise" in compare(some(0.04), found)
    with pytest.raises(CheckFailed, match="out differs in"):
        compare(some(0.4), found)


def test_the_reference_here_is_the_definition() -> None:
    tensors, found = right()
    out = reference(*tensors[:3], CASE.cu_seqlens(CPU), CASE.length, CASE.spec, CASE.scale)
    assert torch.equal(found.out, out)
