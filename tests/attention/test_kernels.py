"""The Triton kernels. On a CPU they run in Triton's interpreter, which must be on before the kernels are imported: the
last test starts this file again in a process that has it on. With a CUDA device everything runs there directly."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention.cases import CASES, TOLERANCE, Case, assert_close, attend, exact_choices, graphs_of_any_documents
from moba_train.attention.blocks import cut
from moba_train.attention.gate import choose as choose_exactly
from moba_train.attention.reference import reference

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPE = torch.float16  # the interpreter knows no bfloat16 products
ON_GPU = not INTERPRETED and torch.cuda.is_available()
kernels = (
    pytest.mark.gpu
    if ON_GPU
    else pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the last test starts")
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
@pytest.mark.parametrize("block_size", [23, 144])
def test_logits_far_below_0(block_size):
    """A key tile's room past its block has the logit 0, which is infinitely above such ones in half precision."""
    case = Case("far_below_0", (3 * block_size,), block_size=block_size, top_k=2)
    query, key, value, grad_out = case.tensors(DEVICE, DTYPE)
    tensors = query + 4, key - 4, value, grad_out  # 16 a dimension
    found = attend(modules()[0].triton_attention, case, case.spec, tensors)
    assert_close(found, attend(reference, case, case.spec, tuple(x.float() for x in tensors)), 2e-2)


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
@pytest.mark.parametrize("what", ["equal", "few", "infinite", "nan"])
def test_choices_where_scores_are_equal_or_no_numbers(what):
    from moba_train.attention.kernels import pool

    case = Case("scores", (700, 1, 0, 150, 40), heads=4, kv_heads=2, top_k=6)
    query, key, _, _ = case.tensors(DEVICE, DTYPE)
    if what in ("equal", "few"):  # small integers in few dimensions: scores are exact, and many the same
        query, key = (tensor.round().mul(torch.arange(32, device=DEVICE) < 3) for tensor in (query, key))
    if what == "few":  # equal scores in some rows and in some tiles alone
        query[::3] += torch.randn(32, generator=torch.Generator().manual_seed(1)).to(query)
    if what == "infinite":
        query[::5, :, 0] = torch.inf
    if what == "nan":
        key[::97, 0, 0], key[33, 1, 2], query[::7] = torch.nan, torch.inf, torch.nan
    blocks, choices = choices_of(case, query, key)
    expected = exact_choices(query, *pool.pool(key, blocks), blocks, 5)
    found = torch.where(choices == 255, -1, choices.int())
    assert torch.equal(found.sort(-1).values, expected.int())


def random_choices(lengths, block_size: int, shape, gaps: bool):
    """Choices (K, T, G, R), and the blocks that they name, counted over all segments: distinct earlier blocks of the
    query's segment, in any order; -1 where there are none left or, with gaps, now and then."""
    kv_heads, group, choose = shape
    blocks = cut(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(), block_size, sum(lengths))
    first = blocks.first[blocks.of_token].view(1, -1, 1, 1)
    earlier = blocks.of_token.view(1, -1, 1, 1) - first
    scores = torch.rand(kv_heads, sum(lengths), group, max(choose, int(earlier.max()) + 1))
    best, choices = scores.masked_fill(torch.arange(scores.shape[-1]) >= earlier, -1).topk(choose)
    none = (best < 0) | (torch.rand_like(best) < 0.2 if gaps else False)
    return torch.where(none, 32767, choices).short(), torch.where(none, -1, choices + first).flatten(1)


@kernels
@pytest.mark.parametrize(
    ("lengths", "block_size", "shape", "constants"),
    [
        ((300,), 16, (2, 1, 3), {"PART_ENTRIES": 64}),
        ((150, 0, 90, 7), 16, (2, 3, 2), {"PART_ENTRIES": 100}),
        ((1, 1, 2), 16, (2, 2, 2), {}),  # no choices at all
        ((33,), 16, (1, 1, 1), {"PART_ENTRIES": 1}),  # as many parts as tokens
        ((300,), 16, (2, 2, 5), {"MOST_COUNTERS": 1}),  # one part
        ((700, 20), 128, (1, 4, 4), {"PART_ENTRIES": 500, "SHORT_COUNTS": 0}),
        ((300,), 16, (1, 1, 15), {"RANK_PROGRAMS": 7}),
        ((2500,), 16, (1, 1, 1), {"PLACE_TOTALS": 64, "PART_ENTRIES": 2000}),  # more blocks than any program has
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize("gaps", [False, True])
def test_lists_are_those_of_a_stable_sort(monkeypatch, lengths, block_size, shape, constants, gaps):
    """And so are their parts, and the tiles that any parts of them are cut into."""
    _, _, route = modules()
    from moba_train.attention.kernels import tiles

    monkeypatch.setattr(tiles, "TILE_LISTS", 64)
    for name, value in constants.items():
        monkeypatch.setattr(route, name, value)
    choices, named = random_choices(lengths, block_size, shape, gaps)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    blocks = cut(bounds.to(DEVICE), block_size, sum(lengths))
    count, group_choices = len(blocks.first), shape[1] * shape[2]
    wanted = torch.where(named < 0, count, named)
    order = wanted.argsort(stable=True)
    lists = route.route(choices.to(DEVICE), blocks)
    entries, offsets = lists.entries.cpu(), lists.offsets.cpu()
    part = torch.arange(wanted.shape[1]) // (lists.part_tokens * group_choices)
    assert offsets.shape == (shape[0], lists.parts + 1, count) and lists.parts == int(part[-1]) + 1
    for head in range(shape[0]):
        held = torch.bincount(wanted[head] * lists.parts + part, minlength=(count + 1) * lists.parts)
        held = held.view(count + 1, -1)[:count]
        ends = held.flatten().cumsum(0).view(count, -1) + head * wanted.shape[1]
        assert torch.equal(offsets[head, 1:].T, ends.int())
        assert torch.equal(offsets[head, :-1].T, (ends - held).int())
        start, stop = int(offsets[head, 0, 0]), int(offsets[head, -1, -1])
        assert torch.equal(entries[start:stop], order[head, : stop - start].int())
    for first, last in ((0, lists.parts), (lists.parts // 2, lists.parts), (0, 1)):
        cut_lists = tiles.tile(lists, first, last, choices.numel(), 16)
        each = (offsets[:, last] - offsets[:, first] + 15).flatten() // 16
        assert torch.equal(
            cut_lists.of_list.cpu(), torch.cat([each.new_zeros(1), each.cumsum(0), each.new_zeros(1)]).int()
        )
        found = torch.full((len(cut_lists.lists),), len(each))
        found[: int(each.sum())] = torch.arange(len(each)).repeat_interleave(each)
        assert torch.equal(cut_lists.lists.cpu(), found.int())


@kernels
@pytest.mark.parametrize("block_size", [16, 144])
def test_chunks_change_nothing(monkeypatch, block_size):
    """A workspace that holds one kv head and part of the tokens."""
    op, plan, route = modules()
    case = Case("chunks", (9 + 10 * 16,) if block_size == 16 else (300,), 2, 2, block_size=block_size, top_k=2)
    tensors = case.tensors(DEVICE, DTYPE)
    for name in ("PART_ENTRIES", "SORT_ENTRIES"):
        monkeypatch.setattr(route, name, 64)
    whole = attend(op.triton_attention, case, case.spec, tensors)
    monkeypatch.setattr(plan, "WORKSPACE_FLOOR", 0)
    monkeypatch.setattr(plan, "WORKSPACE_SHARE", 0.02)
    sizes = plan.Sizes(case.lengths[0], 2, 1, 1, case.head_dim, block_size)
    heads, tokens = plan.chunk_size(sizes, 2)
    assert heads == 1 and tokens < case.lengths[0] / 2
    chunked = attend(op.triton_attention, case, case.spec, tensors)
    assert_close({k: v.float() for k, v in chunked.items()}, {k: v.float() for k, v in whole.items()}, 2e-3)


@kernels
@pytest.mark.parametrize("tile", [64, 192])
def test_rows_out_of_range_are_attended_again(tile):
    from moba_train.attention.kernels import again, launch_forward
    from moba_train.attention.kernels.call import Call
    from moba_train.attention.kernels.plan import Config

    op, _, _ = modules()
    case = Case("again", (300, 41), heads=4, kv_heads=2, head_dim=64, block_size=32, top_k=4)
    query, key, value, *_ = case.tensors(DEVICE, DTYPE)
    blocks, choices = choices_of(case, query, key)
    lists = op._lists(key, *op.route(choices, blocks.bounds, blocks.first, blocks.of_token))
    config = Config(64, 16, 4, 1)
    call = replace(Call.of(query, key, value, blocks, lists, case.block_size, 0.125), configs={"forward": config})
    ((theirs, start, count),) = call.head_groups()
    (chunk,) = call.chunks(start, count)
    partial, lse = launch_forward._partial_outputs(call, theirs, chunk)
    found, numbers = call.tiles(theirs, chunk, Config(tile, 16, 4, 1))
    lost = torch.arange(len(lse), device=DEVICE) % 67 == 5
    lost |= torch.arange(len(lse), device=DEVICE) < 9
    spoiled, infinite = partial.clone(), lse.clone()
    spoiled[lost], infinite[lost] = torch.nan, torch.inf
    entries = chunk.rows * call.sizes.choose
    results = (spoiled, infinite, call.scale, chunk.kv_start, 0, entries)
    written = torch.zeros(len(lse), dtype=torch.bool, device=DEVICE)
    for head in range(count):
        room = slice(int(theirs.offsets[head, 0, 0]), int(theirs.offsets[head, -1, -1]))
        written[head * entries + theirs.entries[room].long()] = True
    for mark in (0, 1):
        of_list = found[1]
        assert of_list[-1] == 0
        of_list[-1] = mark
        again.launch(
            query, key, value, blocks.bounds, *found, *results, *numbers, tile=tile, programs=3, config=config,
            sizes=call.sizes,
        )  # fmt: skip
        assert bool((infinite[lost & written] == torch.inf).all()) is (mark == 0)
    assert written[lost].sum() > 20
    torch.testing.assert_close(infinite[written], lse[written], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spoiled[written], partial[written], rtol=2e-3, atol=2e-3)
    kept = written & ~lost
    assert torch.equal(infinite[kept], lse[kept]) and torch.equal(spoiled[kept], partial[kept])


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
def test_texts_of_many_lengths_share_kernels_and_bits():
    """A kernel is compiled for each number of choices; room for more than there are blocks changes nothing."""
    op, _, _ = modules()
    assert {op.room(100, 16, longest) for longest in range(1, 700)} == {0, 1, 2, 4, 8, 16, 32, 64}
    exact, roomy = (Case("rooms", (100, 37), top_k=top_k) for top_k in (7, 100))
    assert [op.room(case.spec.top_k, 16, 100) for case in (exact, roomy)] == [6, 8]
    found, expected = (attend(op.triton_attention, c, c.spec, c.tensors(DEVICE, DTYPE)) for c in (roomy, exact))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@kernels
def test_a_measurement_checks_the_kernels_and_holds_others_against_them(monkeypatch):
    from moba_train.bench import timing
    from moba_train.bench.cases import Case as Measured
    from moba_train.bench.measure import measure

    monkeypatch.setattr(timing, "SECONDS", dict.fromkeys(timing.SECONDS, 0.0))
    case = Measured("small", 2, 52, 2, 1, 16, 3, 32, "fp16")
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


@kernels
def test_torch_compile_takes_it_whole():
    op, _, _ = modules()
    case = Case("compile", (70, 41), 4, 2, 16, 16, 3)
    compiled = torch.compile(op.triton_attention, fullgraph=True, backend="aot_eager")
    found = attend(compiled, case, case.spec, case.tensors(DEVICE, DTYPE))
    expected = attend(op.triton_attention, case, case.spec, case.tensors(DEVICE, DTYPE))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@kernels
def test_torch_compile_needs_no_graph_for_each_number_of_documents():
    op, _, _ = modules()
    assert graphs_of_any_documents(op.triton_attention, DEVICE, DTYPE) == 2


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the tests above run here themselves")
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
