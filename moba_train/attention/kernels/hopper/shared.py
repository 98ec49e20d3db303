"""What the Hopper kernels share: a block's keys and values as the copy engine brings them, and a tile's entries."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Renamed in Triton 3.9.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
gather = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_DESCRIPTOR = gl.shared_memory_descriptor
reinterpret = getattr(_DESCRIPTOR, "reinterpret", None) or _DESCRIPTOR._reinterpret

HALF: gl.constexpr = gl.constexpr(64)  # rows, or keys, of a warpgroup; a program has two


def described(tensor: torch.Tensor, tile_tokens: int) -> TensorDescriptor:
    """A (T, K, D) tensor as the copy engine reads it: tiles of ``tile_tokens`` tokens of one head, zero past T."""
    tokens, kv_heads, head_dim = tensor.shape
    tile = [tile_tokens, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, getattr(gl, str(tensor.dtype).removeprefix("torch.")))
    return TensorDescriptor(tensor, [tokens, kv_heads * head_dim], [kv_heads * head_dim, 1], tile, layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, STAGES: gl.constexpr):
    """STAGES barriers of COUNT arrivals each."""
    b_barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i_slot in gl.static_range(STAGES):
        mbarrier.init(b_barriers.index(i_slot), count=COUNT)
    return b_barriers


@gluon.jit
def load_tiles(
    d_key, d_value, s_key, s_value, key_full, value_full, key_free, value_free, n_token, i_column, B: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warps: a block's tiles of keys and values, each as soon as its buffer is free."""
    for i_tile in range(B // BLOCK_N):
        i_slot = i_tile % STAGES
        i_phase = (i_tile // STAGES & 1) ^ 1
        n_key = n_token + i_tile * BLOCK_N
        mbarrier.wait(key_free.index(i_slot), i_phase)
        mbarrier.expect(key_full.index(i_slot), d_key.block_type.nbytes)
        copy_tile(d_key, [n_key, i_column], key_full.index(i_slot), s_key.index(i_slot))
        mbarrier.wait(value_free.index(i_slot), i_phase)
        mbarrier.expect(value_full.index(i_slot), d_value.block_type.nbytes)
        copy_tile(d_value, [n_key, i_column], value_full.index(i_slot), s_value.index(i_slot))


@gluon.jit
def part_bounds(p_offsets, i_list, N, P, i_part, n_parts):
    """Where the entries of some parts of list i_list start and stop."""
    p_start = p_offsets + ((i_list // N).to(gl.int64) * (P + 1) + i_part) * N + i_list % N
    return gl.load(p_start), gl.load(p_start + n_parts.to(gl.int64) * N)


@gluon.jit
def find_tile(p_lists, p_of_list, p_offsets, p_bounds, LISTS, N, P, i_part, n_parts):
    """This program's list, where its entries start and stop, and its block's first token. List LISTS: nothing to do."""
    i_list = gl.load(p_lists + gl.program_id(0))
    n_start, n_stop, n_token = i_list * 0, i_list * 0, i_list * 0
    if i_list < LISTS:
        i_tile = gl.program_id(0) - gl.load(p_of_list + i_list)
        n_start, n_stop = part_bounds(p_offsets, i_list, N, P, i_part, n_parts)
        n_start += i_tile * (2 * HALF)
        n_token = gl.load(p_bounds + i_list % N)
    return i_list, n_start, n_stop, n_token


@gluon.jit
def load_entries(p_entries, n_start, n_stop, LAYOUT: gl.constexpr):
    """Entries (HALF,) from n_start on, and which are real: past the end the last one repeats."""
    o_list = n_start + gl.arange(0, HALF, LAYOUT)
    return gl.load(p_entries + gl.minimum(o_list, n_stop - 1)), o_list < n_stop


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
def store_entries(p_partial, p_entries, o_result, n_start, n_stop, s_rows, b_rows, D: gl.constexpr, ROWS: gl.constexpr):
    """Put results (HALF, D) in their entries' places, whole rows at a time by way of shared memory."""
    s_rows.store(b_rows.to(s_rows.dtype))
    o_entry, m_row = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_partial + ((o_result + o_entry) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_rows.load(ROWS), mask=m_row[:, None])
