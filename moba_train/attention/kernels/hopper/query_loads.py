"""What the copying and the gathering warps of ``query``, ``query_narrow`` and ``query_short`` share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moba_train.attention.kernels.hopper.shared import (
    HALF,
    copy_tile,
    find_tile,
    gather,
    load_entries,
    row_starts,
    thread_barrier,
)


@gluon.jit
def bring_keys(
    d_key, d_value, p_lists, p_bounds, s_key, s_value, key_full, value_full, key_free, value_free, i_kv_start, n_tiles,
    N, B: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: keys and values of each tile's block, each as soon as its buffer is free."""
    i_item = i_kv_start * 0
    i_list = gl.load(p_lists + gl.program_id(0))
    n_token = gl.load(p_bounds + i_list % N)
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        # Where the next tile's keys lie is known in time.
        i_next = gl.load(p_lists + gl.minimum(i_tile + gl.num_programs(0), n_tiles - 1))
        n_next = gl.load(p_bounds + i_next % N)
        i_column = (i_kv_start + i_list // N) * D
        for n_key in range(0, B, BLOCK_N):
            i_slot = i_item % STAGES
            i_phase = (i_item // STAGES & 1) ^ 1
            mbarrier.wait(key_free.index(i_slot), i_phase)
            mbarrier.expect(key_full.index(i_slot), d_key.block_type.nbytes)
            copy_tile(d_key, [n_token + n_key, i_column], key_full.index(i_slot), s_key.index(i_slot))
            mbarrier.wait(value_free.index(i_slot), i_phase)
            mbarrier.expect(value_full.index(i_slot), d_value.block_type.nbytes)
            copy_tile(d_value, [n_token + n_key, i_column], value_full.index(i_slot), s_value.index(i_slot))
            i_item += 1
        i_list, n_token = i_next, n_next


@gluon.jit
def all_places(s_place, LAYOUT: gl.constexpr):
    """The places of a tile's results; past the list's end, the last one's again."""
    o_place = s_place.load(LAYOUT)
    return gl.where(o_place < 0, -1 - o_place, o_place)


@gluon.jit
def gather_half(p_base, s_place, s_rows, i_kv, o_result, K, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr):
    """Two warps: rows of HALF entries, a part at a time, since registers are few."""
    PART: gl.constexpr = 16
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    for i_part in gl.static_range(HALF // PART):
        o_entry = all_places(s_place.slice(i_part * PART, PART), gl.SliceLayout(1, ROWS)) - o_result
        o_start = row_starts(o_entry // R, i_kv, K, G, D)
        gather(s_rows.slice(i_part * PART, PART), p_base + (o_start[:, None] + o_d[None, :]))
    async_copy.commit_group()


@gluon.jit
def gather_queries(
    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free, i_tile, i_turn,
    i_kv_start, i_entry_start, n_entries, N, P, i_part, n_parts, K, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Two warps: a tile's queries, of which two tiles have room, and the places of its results, past the list's end
    less than 0. Returns the kv head and what a place is above its entry."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    i_list, n_start, n_stop = find_tile(p_lists, p_of_list, p_offsets, i_tile, N, P, i_part, n_parts, 2)
    i_kv = i_kv_start + i_list // N
    o_result = i_list // N * n_entries - i_entry_start
    i_buffer = i_turn % 2 * 2
    mbarrier.wait(rows_free.index(i_turn % 2), (i_turn // 2 & 1) ^ 1)
    for i_own in gl.static_range(2):
        o_entry, m_row = load_entries(p_entries, n_start + i_own * HALF, n_stop, VECTOR)
        o_place = o_result + o_entry
        s_place.index(i_buffer + i_own).store(gl.where(m_row, o_place, -1 - o_place))
    thread_barrier()  # all places are there
    for i_own in gl.static_range(2):
        i_rows = i_buffer + i_own
        gather_half(p_query, s_place.index(i_rows), s_query.index(i_rows), i_kv, o_result, K, G, R, D)
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()  # all of the warps' copies are fenced
    mbarrier.arrive(rows_full.index(i_turn % 2), count=1)
    return i_kv, o_result
