"""What is varlen's own: bounded memory, few calls, wide and odd inputs."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from attention.cases import CASES, DEVICES, TOLERANCE, Case, assert_close, attend, graphs_of_any_documents
from moba_train.attention import AttentionSpec, keeping, varlen
from moba_train.attention.blocks import cut
from moba_train.attention.dense_cpu import _groups
from moba_train.attention.reference import reference

FULL = AttentionSpec("full")


class Seen(TorchDispatchMode):
    """Counts operators, and keeps the number of elements of the largest tensor that any of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append(str(function))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("case", CASES[:6], ids=str)
@pytest.mark.parametrize("kind", ["moba", "full"])
def test_fp64_is_exact(case, kind):
    spec = case.spec if kind == "moba" else FULL
    tensors = tuple(x.double() for x in case.tensors())
    assert_close(attend(varlen.varlen, case, spec, tensors), attend(reference, case, spec, tensors), 1e-13)


@pytest.mark.parametrize("kind", ["moba", "full"])
def test_large_logits_stay_finite(kind):
    """Logits of thousands: a padded row's probabilities would overflow, and infinity times its zero gradient is NaN."""
    case = Case("large", (33, 49, 17, 65, 101, 27))
    query, key, value, grad_out = (x.double() for x in case.tensors())
    spec, tensors = case.spec if kind == "moba" else FULL, (query * 100, key * 100, value, grad_out)
    assert_close(attend(varlen.varlen, case, spec, tensors), attend(reference, case, spec, tensors), 1e-9)


def test_memory_grows_with_tokens_not_their_square():
    case = Case("long", (6000,), heads=2, kv_heads=1, head_dim=16, block_size=64, top_k=3)
    with Seen() as seen:
        attend(varlen.varlen, case, case.spec, case.tensors())
    query = 6000 * 2 * 16
    assert seen.largest <= 2.5 * query + varlen.dense_cpu.CHUNK_ELEMENTS  # partial outputs of top_k - 1 = 2, padded
    assert seen.largest < 6000 * 6000 / 10


def test_a_few_tiles_are_gathered_at_a_time(monkeypatch):
    case = Case("chunks", (600, 40), heads=4, kv_heads=2, head_dim=16, block_size=32, top_k=4)
    expected = attend(varlen.varlen, case, case.spec, case.tensors())
    taken, take = [], varlen.dense_cpu.RoutedKeys._take
    monkeypatch.setattr(
        varlen.dense_cpu.RoutedKeys, "_take", lambda self, source: taken.append(len(source)) or take(self, source)
    )
    tile = 2 * (varlen.dense_cpu.tile_rows(32) + 32) * 16  # numbers of queries, results, keys and values
    for chunk, tiles in ((5 * tile, 5), (1, 1)):
        monkeypatch.setattr(varlen.dense_cpu, "CHUNK_ELEMENTS", chunk)
        assert_close(attend(varlen.varlen, case, case.spec, case.tensors()), expected, 1e-5)
        assert max(taken) == tiles and len(taken) > 2
        taken.clear()


@pytest.mark.parametrize(("block_size", "top_k"), [(16, 10**12), (10**12, 3)])
def test_more_than_the_longest_segment_has_takes_no_room(block_size, top_k, monkeypatch):
    case = Case("all", (70, 33), block_size=block_size, top_k=top_k)
    clipped = Case("all", (70, 33), block_size=min(block_size, 70), top_k=min(top_k, 5))
    expected = attend(reference, clipped, clipped.spec, case.tensors())
    asked, choose = [], varlen.varlen_choose
    monkeypatch.setattr(varlen, "varlen_choose", lambda *given: asked.append(given[3:]) or choose(*given))
    assert_close(attend(varlen.varlen, case, case.spec, case.tensors()), expected, 1e-5)
    assert asked == [(clipped.block_size, 1 if clipped.block_size == 70 else 5)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [16, 90])
def test_ranges_of_tokens_change_nothing(device, block_size, monkeypatch):
    """A small workspace makes many ranges, of one block at least, whose partial outputs fit; documents and tails fall
    across them."""
    case = Case("ranges", (330, 1, 0, 275, 33), block_size=block_size, top_k=5)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = case.tensors(device, dtype)
    expected = attend(varlen.varlen, case, case.spec, tensors)
    slots = min(case.top_k, 329 // block_size + 1) - 1
    original, ranges = varlen._ranges, []

    def spy(*arguments):
        ranges.append(list(original(*arguments)))
        return ranges[-1]

    monkeypatch.setattr(varlen, "_ranges", spy)
    for workspace, least in ((1, 4), (2 * tensors[0].numel(), 2)):  # at least as large as the query
        monkeypatch.setattr(varlen, "WORKSPACE_ELEMENTS", workspace)
        assert_close(attend(varlen.varlen, case, case.spec, tensors), expected, TOLERANCE[dtype])
        assert len(ranges) == 2
        for direction in ranges:
            assert len(direction) >= least
            assert [here.start for here, _ in direction[1:]] == [here.stop for here, _ in direction[:-1]]
            token = slots * case.heads * case.head_dim  # of partial outputs
            sizes = [(here.stop - here.start) * token for here, _ in direction]
            room = max(workspace, tensors[0].numel(), block_size * token)
            assert max(sizes) <= room
            assert all(size + after > room - block_size * token for size, after in pairwise(sizes)), "too many"
        ranges.clear()


def test_many_segments_are_few_calls():
    """2,000 documents of 1 to 40 tokens: calls follow the distinct lengths, not the documents."""
    lengths = tuple((torch.arange(2000) * 7919 % 40 + 1).tolist())
    case = Case("many", lengths, heads=2, kv_heads=1, head_dim=8, block_size=16, top_k=2)
    for spec in (case.spec, FULL):
        with Seen() as seen:
            attend(varlen.varlen, case, spec, case.tensors())
        assert len(seen.calls) < 2500


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([256] * 16, [(16, 256, True)]),
        ([5] + [16] * 9 + [3], [(1, 5, True), (9, 16, True), (1, 3, True)]),
        ([1500, 1501], [(1, 1500, True), (1, 1501, True)]),
        ([97, 111, 0, 112, 100], [(4, 112, False)]),
    ],
    ids=["blocks", "tails", "long_ones_exactly", "rounded_up"],
)
def test_spans_are_grouped_by_length(lengths, groups):
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert [(g.count, g.width, g.index is None) for g in _groups(bounds)] == groups


@pytest.mark.parametrize("device", DEVICES)
def test_its_operators_are_what_they_tell_the_compiler(device):
    """Shapes, types and layouts of what they return, also to inputs that are not contiguous; nothing is changed."""
    case = Case("operators", (33, 0, 57))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.tensors(device, dtype)[:3])
    query, key, value = (x.requires_grad_() for x in strided)
    bounds, (block_size, top_k) = case.cu_seqlens(device), case.spec.moba
    gate = (query.detach(), key.detach(), bounds, block_size, top_k)
    blocks = cut(bounds, block_size, len(query)).bounds
    inputs, choices = (query, key, value), varlen.varlen_choose(*gate)
    torch.library.opcheck(varlen.varlen_choose, gate)
    torch.library.opcheck(varlen.varlen_full, (*inputs, bounds, 57, 0.25))
    torch.library.opcheck(varlen.varlen_moba, (*inputs, choices, blocks, block_size, 0.25))


def test_torch_compile_needs_no_graph_for_each_number_of_documents():
    assert graphs_of_any_documents(varlen.varlen, "cpu", torch.float32) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_need_not_be_contiguous(device):
    case = Case("strided", (90, 21))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = case.tensors(device, dtype)
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors)
    for spec in (case.spec, FULL):
        expected = attend(varlen.varlen, case, spec, tensors)
        inputs = [x.detach().requires_grad_() for x in strided[:3]]
        out = varlen.varlen(*inputs, case.cu_seqlens(device), 90, spec, case.head_dim**-0.5)
        out.backward(strided[3])
        found = {"out": out.detach(), **{f"grad_{n}": x.grad for n, x in zip("qkv", inputs, strict=True)}}
        assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_uninitialised_memory_is_never_read(device):
    """With fresh memory filled with NaN, results stay the same and finite."""
    case = Case("poison", (150, 3, 0, 41))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tensors = case.tensors(device, dtype)
    for spec in (case.spec, FULL):
        expected = attend(varlen.varlen, case, spec, tensors)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty
        try:
            found = attend(varlen.varlen, case, spec, tensors)
        finally:
            torch.use_deterministic_algorithms(False)
        assert_close(found, expected, TOLERANCE[dtype])


def test_saved_choices_spare_recomputation_the_gate():
    case = Case("recomputed", (80,))
    query, key, value, grad_out = case.tensors()
    arguments = (case.cu_seqlens(), 80, case.spec, 0.2)

    def keep_choices(context, function, *args, **kwargs):
        keep = function is torch.ops.moba_train.varlen_choose.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    query.requires_grad_()
    varlen.varlen(query, key, value, *arguments).backward(grad_out)
    expected, query.grad = query.grad, None
    with Seen() as seen:
        out = checkpoint(
            lambda q: varlen.varlen(q, key, value, *arguments),
            query,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep_choices),
        )
        out.backward(grad_out)
    torch.testing.assert_close(query.grad, expected)
    assert sum("varlen_choose" in name for name in seen.calls) == 1


def test_refusals_name_the_reason():
    query = torch.zeros(4, 2, 8)
    assert varlen.refuses(query, query, FULL) is None
    assert "meta" in varlen.refuses(query.to("meta"), query, FULL)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "reason"),
    [
        (8, torch.bfloat16, None),
        (256, torch.float16, None),
        (60, torch.bfloat16, "head_dim up to 256 in multiples of 8, and query has 60"),
        (264, torch.bfloat16, "head_dim up to 256 in multiples of 8, and query has 264"),
        (64, torch.float32, "takes bfloat16 and float16, and query is torch.float32"),
    ],
)
def test_what_cuda_takes(head_dim: int, dtype: torch.dtype, reason: str | None):
    query = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(4, 2, head_dim))  # no GPU is needed
    found = varlen.refuses(query, query, FULL)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("bounds", "longest", "rows"),
    [
        ([0, 6], 6, 1),
        ([0, 6], 9, 1),
        ([0, 3, 6], 3, 2),
        ([0, 2, 4, 6], 2, 3),
        ([0, 2, 6], 4, 0),
        ([0, 3, 6], 6, 0),  # a bound that is not the longest segment's length tells nothing
        ([0, 3, 6, 6], 3, 0),
    ],
)
def test_whole_rows_go_to_their_own_kernel(bounds: list[int], longest: int, rows: int, monkeypatch):
    unreadable = torch.empty(len(bounds), dtype=torch.int32, device="meta")
    assert varlen.whole_rows(6, unreadable, longest) == rows

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []
    monkeypatch.setattr(varlen.dense_cuda, "whole_rows", lambda q, k, v, rows, scale: asked.append(rows))
    monkeypatch.setattr(varlen, "varlen_full", lambda *arguments: asked.append("packed") or (None, None))
    query = torch.zeros(6, 2, 8).as_subclass(OnGpu)
    varlen.varlen(query, query, query, unreadable, longest, FULL, 1.0)
    assert asked == [rows or "packed"]


def test_whole_rows_are_exact():
    case = Case("rows", (37, 37, 37), heads=6, kv_heads=2, head_dim=16)
    tensors = tuple(x.double() for x in case.tensors())

    def rows(query, key, value, bounds, longest, spec, scale):
        return varlen.dense_cuda.whole_rows(query, key, value, varlen.whole_rows(111, bounds, longest), scale)

    assert_close(attend(rows, case, FULL, tensors), attend(reference, case, FULL, tensors), 1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_full_rows_on_the_gpu(head_dim: int, rows: int, keep: bool):
    device = torch.device("cuda")
    tensors = [torch.randn(777 * rows, heads, head_dim, device=device) for heads in (8, 2, 2, 8)]
    query, key, value, grad_out = (x.bfloat16() for x in tensors)
    bounds = 777 * torch.arange(rows + 1, dtype=torch.int32, device=device)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    kinds = frozenset({keeping.ATTENTION}) if keep else frozenset()
    out = checkpoint(
        lambda *x: varlen.varlen(*x, bounds, 777, FULL, head_dim**-0.5),
        *inputs,
        use_reentrant=False,
        context_fn=lambda: keeping.contexts(kinds),
    )
    found = [out, *torch.autograd.grad(out, inputs, grad_out)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference(*exact, bounds, 777, FULL, head_dim**-0.5)
    for got, want in zip(found, [expected, *torch.autograd.grad(expected, exact, grad_out.double())], strict=True):
        assert (got.double() - want).norm() < 6e-3 * want.norm()
