"""What the Hopper kernels share: a block's keys and values as the copy engine brings them, and a tile's entries.

``number * 0``, here and in its neighbours, is a zero that loops carry and functions take as a number: the literal is a
constant of the compilation.
"""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Renamed in Triton 3.9.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_DESCRIPTOR = gl.shared_memory_descriptor
reinterpret = getattr(_DESCRIPTOR, "reinterpret", None) or _DESCRIPTOR._reinterpret

HALF: gl.constexpr = gl.constexpr(64)  # rows, or keys, of a warpgroup; a program has two


@cache
def programs(device: torch.device) -> int:
    """One for each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def described(tensor: torch.Tensor, tile_tokens: int) -> TensorDescriptor:
    """A (T, K, D) tensor as the copy engine reads it: tiles of ``tile_tokens`` tokens of one head, zero past T."""
    tokens, kv_heads, head_dim = tensor.shape
    tile = (tile_tokens, head_dim)
    return TensorDescriptor(
        tensor, [tokens, kv_heads * head_dim], [kv_heads * head_dim, 1], list(tile), swizzled(tile, tensor.dtype)
    )


@cache  # made anew it takes as long as a launch
def swizzled(tile: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How the copy engine lays a tile into shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(tile), getattr(gl, str(dtype).removeprefix("torch.")))


@gluon.jit
def barriers(COUNT: gl.constexpr, STAGES: gl.constexpr):
    """STAGES barriers of COUNT arrivals each."""
    b_barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i_slot in gl.static_range(STAGES):
        mbarrier.init(b_barriers.index(i_slot), count=COUNT)
    return b_barriers


@gluon.jit
def bring(d_tensor, n_row, i_column, s_ring, full, free, i_item, STAGES: gl.constexpr):
    """Have item i_item of the ring brought, when its place is free."""
    i_slot = i_item % STAGES
    mbarrier.wait(free.index(i_slot), (i_item // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(i_slot), d_tensor.block_type.nbytes)
    copy_tile(d_tensor, [n_row, i_column], full.index(i_slot), s_ring.index(i_slot))
    return i_item + 1


@gluon.jit
def mask_scores(
    b_scores, n_key, n_shared, n_first, b_begin, b_token, BLOCK_N: gl.constexpr, SCORES: gl.constexpr
):  # fmt: skip
    """-inf where a row may not read; whole tiles that all rows read are left alone."""
    if (n_key < n_shared) | (n_key + BLOCK_N > n_first + 1):
        o_key = n_key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        m_read = (o_key[None, :] >= b_begin[:, None]) & (o_key[None, :] <= b_token[:, None])
        b_scores = gl.where(m_read, b_scores, -float("inf"))
    return b_scores


@gluon.jit
def attend_keys(
    b_max, b_sum, b_out, s_rows, s_ring, full, free, i_item, n_start, n_shared, n_stop, n_first, b_begin, b_token,
    scale, FOLDED: gl.constexpr, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Go on with a softmax of HALF rows over the keys n_start to n_stop, which the ring holds from item i_item on.

    While the tensor cores multiply one tile's weights with its values, the softmax of the next tile's scores is made.
    FOLDED: the output so far is not zero. MASKED: see ``mask_scores``.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = b_out.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    TYPE: gl.constexpr = s_rows.dtype
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    i_key = i_item
    mbarrier.wait(full.index(i_key % STAGES), i_key // STAGES & 1)
    b_scores = warpgroup_mma(s_rows, s_ring.index(i_key % STAGES).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_scores = warpgroup_mma_wait(0, deps=[b_scores])
    mbarrier.arrive(free.index(i_key % STAGES), count=1)
    if MASKED:
        b_scores = mask_scores(b_scores, n_start, n_shared, n_first, b_begin, b_token, BLOCK_N, SCORES)
    b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
    b_weight = gl.exp2(b_scores * scale - b_new[:, None])
    b_decay = gl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + gl.sum(b_weight, 1)
    b_max = b_new
    if FOLDED:
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
    b_left = gl.convert_layout(b_weight.to(TYPE), WEIGHTS)
    i_item += 1
    for n_key in range(n_start + BLOCK_N, n_stop, BLOCK_N):
        i_key, i_value = i_item, i_item + 1
        mbarrier.wait(full.index(i_key % STAGES), i_key // STAGES & 1)
        b_scores = warpgroup_mma(
            s_rows, s_ring.index(i_key % STAGES).permute((1, 0)), b_none, use_acc=False, is_async=True
        )
        mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
        b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        mbarrier.arrive(free.index(i_key % STAGES), count=1)
        if MASKED:
            b_scores = mask_scores(b_scores, n_key, n_shared, n_first, b_begin, b_token, BLOCK_N, SCORES)
        b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
        b_weight = gl.exp2(b_scores * scale - b_new[:, None])
        b_decay = gl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + gl.sum(b_weight, 1)
        b_max = b_new
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        mbarrier.arrive(free.index(i_value % STAGES), count=1)
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
        b_left = gl.convert_layout(b_weight.to(TYPE), WEIGHTS)
        i_item += 2
    i_value = i_item
    mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
    b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, deps=[b_out])
    mbarrier.arrive(free.index(i_value % STAGES), count=1)
    i_item += 1
    return b_max, b_sum, b_out, i_item


@gluon.jit
def part_bounds(p_offsets, i_list, N, P, i_part, n_parts):
    """Where the entries of some parts of list i_list start and stop."""
    p_start = p_offsets + ((i_list // N).to(gl.int64) * (P + 1) + i_part) * N + i_list % N
    return gl.load(p_start), gl.load(p_start + n_parts.to(gl.int64) * N)


@gluon.jit
def row_starts(o_row, i_kv, K, G: gl.constexpr, D: gl.constexpr):
    """Where rows of kv head i_kv start in a (T, H, D) tensor."""
    return ((o_row // G).to(gl.int64) * K * G + i_kv * G + o_row % G) * D


@gluon.jit
def load_rows(p_base, o_row, i_kv, s_rows, K, G: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr):
    """Bring rows (HALF, D) of a (T, H, D) tensor into shared memory."""
    o_start = row_starts(o_row, i_kv, K, G, D)
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    s_rows.store(gl.load(p_base + o_start[:, None] + o_d[None, :]))


@gluon.jit
def load_entries(p_entries, n_start, n_stop, LAYOUT: gl.constexpr):
    """Entries (HALF,) from n_start on, and which are real: past the end the last one repeats."""
    o_list = n_start + gl.arange(0, HALF, LAYOUT)
    return gl.load(p_entries + gl.minimum(o_list, n_stop - 1)), o_list < n_stop


@gluon.jit
def find_tile(p_lists, p_of_list, p_offsets, i_tile, N, P, i_part, n_parts, WIDTH: gl.constexpr):
    """A tile's list, where its entries start, and where the list's stop."""
    i_list = gl.load(p_lists + i_tile)
    n_start, n_stop = part_bounds(p_offsets, i_list, N, P, i_part, n_parts)
    return i_list, n_start + (i_tile - gl.load(p_of_list + i_list)) * (WIDTH * HALF), n_stop
