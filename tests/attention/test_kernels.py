"""The Triton kernels. On a CPU they run in Triton's interpreter, which must be on before the kernels are imported: the
last test starts this file again in a process that has it on. With a CUDA device everything runs there directly."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention.cases import CASES, TOLERANCE, Case, assert_close, attend
from moba_train.attention.blocks import cut
from moba_train.attention.gate import choose as choose_exactly
from moba_train.attention.reference import reference

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float16  # the interpreter knows no bfloat16 products
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="runs in the process that the last test starts"
)
SHARED = {
    "empty_segments",
    "many_short_documents",
    "own_block_only",
    "one_kv_head",
    "block_of_any_size",
}


def modules():
    from moba_train.attention.kernels import op, plan, route

    return op, plan, route


def compare(case: Case) -> None:
    op, _, _ = modules()
    tensors = case.tensors(DEVICE, DTYPE)
    found = attend(op.triton_attention, case, case.spec, tensors)
    assert_close(found, attend(reference, case, case.spec, tuple(x.float() for x in tensors)), TOLERANCE[DTYPE])


def choices_of(case: Case, query, key):
    op, _, _ = modules()
    block_size, top_k = case.spec.moba
    blocks = cut(case.cu_seqlens(DEVICE), block_size, len(query))
    return blocks, op.choose(query, key, blocks.bounds, blocks.first, blocks.of_token, block_size, top_k)


@kernels
@pytest.mark.parametrize("case", [case for case in CASES if case.name in SHARED], ids=str)
def test_shared_cases(case):
    compare(case)


@kernels
@pytest.mark.parametrize(
    "case",
    [
        Case("keys_in_several_tiles", (300,), heads=2, kv_heads=1, block_size=144, top_k=2),
        Case("head_dim_96", (70, 9), heads=3, kv_heads=1, head_dim=96),
        Case("head_dim_256", (50,), heads=1, kv_heads=1, head_dim=256, top_k=2),
    ],
    ids=str,
)
def test_other_tilings(case):
    compare(case)


@kernels
def test_choices_are_the_definition_s():
    case = Case("choices", (150, 0, 90, 20), top_k=4)
    query, key, _, _ = case.tensors(DEVICE, DTYPE)
    blocks, choices = choices_of(case, query, key)
    exact = choose_exactly(query, key, blocks, case.spec).view(len(query), case.kv_heads, -1, 3).permute(1, 0, 2, 3)
    first = blocks.first[blocks.of_token].view(1, -1, 1, 1)
    found = torch.where(choices == torch.iinfo(choices.dtype).max, -1, choices.int() + first)
    assert choices.dtype == torch.uint8
    assert torch.equal(found.sort(-1).values, exact.int().sort(-1).values)


@kernels
def test_ties_go_to_the_earlier_block():
    case = Case("ties", (160,), heads=1, kv_heads=1, top_k=3)
    query, key, _, _ = case.tensors(DEVICE, DTYPE)
    _, choices = choices_of(case, query, torch.ones_like(key))
    assert choices[0, 48:, 0].sort(-1).values.unique(dim=0).tolist() == [[0, 1]]


@kernels
def test_a_query_without_numbers_still_reads_its_share_of_blocks():
    case = Case("nan", (160,), heads=1, kv_heads=1, top_k=3)
    query, key, _, _ = case.tensors(DEVICE, DTYPE)
    query[100:] = torch.nan
    _, choices = choices_of(case, query, key)
    assert (choices[0, 32:] < 10).all()


@kernels
def test_lists_hold_every_entry_once_in_ascending_order():
    _, _, route = modules()
    case = Case("lists", (150, 90), top_k=4)
    query, key, _, _ = case.tensors(DEVICE, DTYPE)
    blocks, choices = choices_of(case, query, key)
    lists = route.route(choices, blocks)
    entries, offsets = lists.entries.tolist(), lists.offsets.tolist()
    flat = choices.flatten(1).tolist()
    for head in range(case.kv_heads):
        for block in range(len(blocks.first)):
            at = (head * len(blocks.first) + block) * lists.parts
            found = entries[offsets[at] : offsets[at + lists.parts]]
            wanted = [
                entry
                for entry, choice in enumerate(flat[head])
                if choice != 255 and int(blocks.first[blocks.of_token[entry // 6]]) + choice == block
            ]
            assert found == wanted


@kernels
@pytest.mark.parametrize("block_size", [16, 144])
def test_chunks_change_nothing(monkeypatch, block_size):
    """A workspace that holds one kv head and part of the tokens."""
    op, plan, route = modules()
    case = Case("chunks", (9 + 10 * 16,) if block_size == 16 else (300,), 2, 2, block_size=block_size, top_k=2)
    tensors = case.tensors(DEVICE, DTYPE)
    monkeypatch.setattr(route, "COUNT_ENTRIES", 64)
    whole = attend(op.triton_attention, case, case.spec, tensors)
    monkeypatch.setattr(plan, "WORKSPACE_FLOOR", 0)
    monkeypatch.setattr(plan, "WORKSPACE_SHARE", 0.02)
    sizes = plan.Sizes(case.lengths[0], 2, 1, 1, case.head_dim, block_size)
    heads, tokens = plan.chunk_size(sizes, 2)
    assert heads == 1 and tokens < case.lengths[0] / 2
    chunked = attend(op.triton_attention, case, case.spec, tensors)
    assert_close({k: v.float() for k, v in chunked.items()}, {k: v.float() for k, v in whole.items()}, 2e-3)


@kernels
def test_a_repeat_changes_no_bit():
    op, _, _ = modules()
    case = Case("repeat", (50, 33), heads=2, kv_heads=1)
    first, again = (attend(op.triton_attention, case, case.spec, case.tensors(DEVICE, DTYPE)) for _ in range(2))
    assert all(torch.equal(again[name], first[name]) for name in first)


@kernels
def test_no_kernel_reads_what_none_wrote(monkeypatch):
    op, _, _ = modules()
    case = Case("poison", (75, 0, 40), heads=2, kv_heads=1)
    tensors = case.tensors(DEVICE, DTYPE)
    clean = attend(op.triton_attention, case, case.spec, tensors)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))
    found = attend(op.triton_attention, case, case.spec, tensors)
    for name, expected in clean.items():
        assert torch.equal(found[name], expected), name


@kernels
def test_operators_keep_torch_s_contract():
    """Schemas, fake implementations and autograd, also for tensors that are not contiguous."""
    op, _, _ = modules()
    case = Case("operators", (40,), heads=2, kv_heads=1, top_k=2)
    query, key, value, _ = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.tensors(DEVICE, DTYPE))
    blocks, choices = choices_of(case, query, key)
    bounds = (blocks.bounds, blocks.first, blocks.of_token)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.choose, (query, key, *bounds, 16, 2), test_utils=tests)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(op.route, (choices, *bounds), test_utils=tests)
    torch.library.opcheck(op.attend, (*inputs, *bounds, *op.route(choices, *bounds), 16, 0.2), test_utils=tests)


@kernels
def test_checkpointing_can_keep_the_choices(monkeypatch):
    op, _, _ = modules()
    case = Case("checkpoint", (40,), heads=2, kv_heads=1, top_k=2)
    query, key, value, grad_out = case.tensors(DEVICE, DTYPE)
    selections = []
    select = op.select
    monkeypatch.setattr(op, "select", lambda *args: selections.append(1) or select(*args))

    def policy(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
        kept = operator is torch.ops.moba_train.choose.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(*args):
        return checkpoint(
            lambda *inputs: op.triton_attention(*inputs),
            *args,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    found = attend(checkpointed, case, case.spec, (query, key, value, grad_out))
    assert len(selections) == 1
    expected = attend(op.triton_attention, case, case.spec, (query, key, value, grad_out))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@kernels
def test_more_blocks_than_there_are_is_dense():
    compare(Case("dense", (70, 33), top_k=500))


@kernels
def test_a_measurement_checks_the_kernels_and_holds_others_against_them(monkeypatch):
    from moba_train.bench import timing
    from moba_train.bench.cases import Case as Measured
    from moba_train.bench.measure import measure

    monkeypatch.setattr(timing, "SECONDS", dict.fromkeys(timing.SECONDS, 0.0))
    case = Measured("small", 2, 75, 4, 2, 16, 3, 32, "fp16")
    row = measure(case, ["triton", "varlen", "reference"], torch.device(DEVICE), None)
    for name, column in row["columns"].items():
        assert column["checked"] and not column["failed"] and min(column["times"]) > 0, (name, column)
    assert "d_key" in row["columns"]["triton"]["checked"]
    assert row["columns"]["reference"]["checked"].startswith("0.00% of the rows chose otherwise")


@kernels
def test_a_measurement_tells_wrong_kernels(monkeypatch):
    from moba_train.bench import check
    from moba_train.bench.cases import Case as Measured
    from moba_train.bench.implementations import judge, moba, results

    case = Measured("small", 2, 75, 4, 2, 16, 3, 32, "fp16")
    tensors = case.tensors(torch.device(DEVICE))
    found = results(moba("triton", case, torch.device(DEVICE)), tensors)
    judged = judge("triton", case, tensors, found)
    assert "d_key" in judged.verdict()
    judged.lse = judged.lse + 0.05
    with pytest.raises(check.CheckFailed, match="d_"):
        judged.verdict()
    judged = judge("triton", case, tensors, found)
    monkeypatch.setattr(check, "ROWS", 400)
    judged.choices[140:, :, 0] = 5 + (judged.choices[140:, :, 0] - 5 + 1) % 3
    with pytest.raises(check.CheckFailed, match="gate"):
        judged.verdict()


@pytest.mark.parametrize("kibibytes", [99, 163, 227])
@pytest.mark.parametrize("block_size", [16, 100, 128, 4096])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_tiles_fit_the_shared_memory(head_dim, block_size, kibibytes):
    _, plan, _ = modules()
    row_bytes = 2 * max(64, 1 << (head_dim - 1).bit_length())
    for kernel, config in plan.configs(head_dim, block_size, kibibytes << 10).items():
        assert plan.shared_bytes(kernel, config, row_bytes) <= kibibytes << 10
        assert min(config.rows, config.keys) >= 16 and config.stages >= 1


@kernels
def test_refusals_name_the_reason():
    op, _, _ = modules()
    tensors = {dim: Case("r", (20,), head_dim=dim).tensors(DEVICE, DTYPE)[:2] for dim in (8, 16, 32, 36, 264)}
    spec = Case("r", (20,)).spec
    assert op.refuses(*tensors[32], spec) is None
    assert op.refuses(*tensors[16], spec) is None
    assert op.refuses(*tensors[8], spec) == "it takes head_dim in multiples of 8 from 16 to 256, and query has 8"
    assert "query has 36" in op.refuses(*tensors[36], spec)
    assert "query has 264" in op.refuses(*tensors[264], spec)
    assert "block_size 8" in op.refuses(*tensors[32], Case("r", (20,), block_size=8).spec)
    assert "float32" in op.refuses(*(x.float() for x in tensors[32]), spec)
    with pytest.raises(ValueError, match=r"scale is -1.0"):
        op.triton_attention(*tensors[32], tensors[32][1], torch.tensor([0, 20]).int().to(DEVICE), 20, spec, -1.0)


@kernels
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "top_k", "refusal"),
    [
        (1 << 20, 32, 8, 33, None),
        (1 << 20, 32, 8, 65, "there are 2147483648 choices, above 2146435072"),
        (1 << 20, 16, 1, 65, "one kv head makes 1073741824 choices, above 1073741824"),
        (1 << 10, 32, 8, 10**9, None),  # more than there are
    ],
)
def test_more_choices_than_int32_counts_are_refused(tokens, heads, kv_heads, top_k, refusal):
    """Lists of all kv heads follow each other, in one count."""
    op, _, _ = modules()
    query, key = (torch.empty(1, 1, 1, dtype=DTYPE, device=DEVICE).expand(tokens, n, 64) for n in (heads, kv_heads))
    found = op.refuses(query, key, Case("r", (20,), block_size=16, top_k=top_k).spec)
    assert found is None if refusal is None else found.startswith(refusal)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above run here themselves")
def test_all_of_the_above_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
