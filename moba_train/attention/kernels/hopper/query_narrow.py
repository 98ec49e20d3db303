"""``query`` for head_dim 64, where products are short: their operands come from registers where that saves time.

Programs, tiles and copying warps are those of ``query``. A warpgroup takes its queries and gradients into registers and
starts the next tile of keys' scores behind this tile's product. Only between tiles of entries, where those operands
change, the tensor cores are left to the other warpgroup.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.query_loads import bring_keys, gather_half
from moba_train.attention.kernels.hopper.shared import HALF, barriers, find_tile, gather, load_entries, thread_barrier
from moba_train.attention.kernels.plan import Config
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=128, keys=64, warps=4, stages=6)


@gluon.jit
def _gather_rows(
    p_query, p_d_out, p_lse, p_delta, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place, s_lse,
    s_delta, rows_full, rows_free, i_kv_start, i_entry_start, n_entries, n_tiles, W, N, P, i_part, n_parts, K,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The gathering warps: a tile's queries and gradients with their log-sum-exps and deltas, and the places of its
    results, past the list's end less than 0."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_list, n_start, n_stop = find_tile(p_lists, p_of_list, p_offsets, i_tile, N, P, i_part, n_parts, 2)
        i_kv = i_kv_start + i_list // N
        o_result = i_list // N * n_entries - i_entry_start
        mbarrier.wait(rows_free.index(0), (i_turn & 1) ^ 1)
        for i_own in gl.static_range(2):
            o_entry, m_row = load_entries(p_entries, n_start + i_own * HALF, n_stop, VECTOR)
            o_place = o_result + o_entry
            s_place.index(i_own).store(gl.where(m_row, o_place, -1 - o_place))
            o_sums = i_kv.to(gl.int64) * W + o_entry // R
            gather(s_lse.index(i_own), p_lse + o_sums)
            gather(s_delta.index(i_own), p_delta + o_sums)
        thread_barrier()  # all places are there
        for i_own in gl.static_range(2):
            gather_half(p_query, s_place.index(i_own), s_query.index(i_own), i_kv, o_result, K, G, R, D)
            gather_half(p_d_out, s_place.index(i_own), s_d_out.index(i_own), i_kv, o_result, K, G, R, D)
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()  # all of the warps' copies are fenced
        mbarrier.arrive(rows_full.index(0), count=1)
        i_turn += 1


@gluon.jit
def start_scores(
    b_query, b_d_out, s_key, s_value, key_full, value_full, i_item, SCORES: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Start the scores of a tile of keys and the gradients of its weights, (HALF, BLOCK_N) each."""
    i_slot, i_phase = i_item % STAGES, i_item // STAGES & 1
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(key_full.index(i_slot), i_phase)
    b_scores = warpgroup_mma(b_query, s_key.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    mbarrier.wait(value_full.index(i_slot), i_phase)
    b_d_weight = warpgroup_mma(b_d_out, s_value.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    return b_scores, b_d_weight


@gluon.jit
def _take_rows(
    s_query, s_d_out, s_place, s_lse, s_delta, rows_full, rows_free, i_turn, SCORES: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """A warpgroup's rows of a tile, into registers: the next tile's may come."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    mbarrier.wait(rows_full.index(0), i_turn & 1)
    b_query, b_d_out = s_query.load(LEFT), s_d_out.load(LEFT)
    b_lse, b_delta = s_lse.load(gl.SliceLayout(1, SCORES)), s_delta.load(gl.SliceLayout(1, SCORES))
    o_place = s_place.load(gl.SliceLayout(1, ROWS))
    mbarrier.arrive(rows_free.index(0), count=1)
    return b_query, b_d_out, b_lse, b_delta, o_place


@gluon.jit
def add_keys(
    b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_key, value_free, i_item, scale, STAGES: gl.constexpr
):  # fmt: skip
    """Start adding a tile of keys to dQ (unscaled). Its scores are there, the gradients of its weights on their way."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(0, b_d_query.type.layout, 2)
    b_weight = gl.exp2(b_scores * scale - b_lse[:, None])
    b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
    mbarrier.arrive(value_free.index(i_item % STAGES), count=1)
    b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(s_key.dtype)
    b_left = gl.convert_layout(b_d_scores, RIGHT)
    return warpgroup_mma(b_left, s_key.index(i_item % STAGES), b_d_query, is_async=True)


@gluon.jit
def _sum_query(
    p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_out, s_key, s_value, key_full, value_full, key_free,
    value_free, rows_full, rows_free, scale, n_tiles, I_OWN: gl.constexpr, LOG2_E: gl.constexpr, B: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = s_query.dtype
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    i_item, i_turn = n_tiles * 0, n_tiles * 0
    for _i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        b_query, b_d_out, b_lse, b_delta, o_place = _take_rows(
            s_query.index(I_OWN), s_d_out.index(I_OWN), s_place.index(I_OWN), s_lse.index(I_OWN), s_delta.index(I_OWN),
            rows_full, rows_free, i_turn, SCORES, ROWS,
        )  # fmt: skip
        b_scores, b_d_weight = start_scores(
            b_query, b_d_out, s_key, s_value, key_full, value_full, i_item, SCORES, BLOCK_N, STAGES
        )
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
        for _ in range(BLOCK_N, B, BLOCK_N):
            b_d_query = add_keys(
                b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_key, value_free, i_item, scale, STAGES
            )
            b_scores, b_d_weight = start_scores(
                b_query, b_d_out, s_key, s_value, key_full, value_full, i_item + 1, SCORES, BLOCK_N, STAGES
            )
            b_scores, b_d_query = warpgroup_mma_wait(1, deps=[b_scores, b_d_query])
            mbarrier.arrive(key_free.index(i_item % STAGES), count=1)
            i_item += 1
        b_d_query = add_keys(b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_key, value_free, i_item, scale, STAGES)
        b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
        mbarrier.arrive(key_free.index(i_item % STAGES), count=1)
        s_out.index(I_OWN).store((b_d_query * (scale / LOG2_E)).to(TYPE))
        p_rows = p_partial + (o_place.to(gl.int64) * D)[:, None] + o_d[None, :]
        gl.store(p_rows, s_out.index(I_OWN).load(ROWS), mask=(o_place >= 0)[:, None])
        i_item += 1
        i_turn += 1


@gluon.jit(do_not_specialize=NUMBERS)
def routed_query_narrow_hopper_kernel(
    d_key,
    d_value,
    p_query,
    p_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_lists,
    p_of_list,
    p_offsets,
    p_entries,
    p_partial,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    W,
    LISTS,
    N,
    P,
    i_part,
    n_parts,
    K,
    LOG2_E: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    B: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_tiles = gl.load(p_of_list + LISTS)
    TYPE: gl.constexpr = p_query.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_query = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_out = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_place = gl.allocate_shared_memory(gl.int32, [2, HALF], NUMBER)
    s_lse = gl.allocate_shared_memory(gl.float32, [2, HALF], NUMBER)
    s_delta = gl.allocate_shared_memory(gl.float32, [2, HALF], NUMBER)
    s_key = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_value.layout)
    key_full, value_full, key_free, value_free = (
        barriers(1, STAGES), barriers(1, STAGES), barriers(2, STAGES), barriers(2, STAGES)
    )  # fmt: skip
    rows_full, rows_free = barriers(1, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_out, s_key, s_value, key_full, value_full,
                key_free, value_free, rows_full, rows_free, scale, n_tiles, 0, LOG2_E, B, D, BLOCK_N, STAGES,
            )),
            (_sum_query, (
                p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_out, s_key, s_value, key_full, value_full,
                key_free, value_free, rows_full, rows_free, scale, n_tiles, 1, LOG2_E, B, D, BLOCK_N, STAGES,
            )),
            (_gather_rows, (
                p_query, p_d_out, p_lse, p_delta, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place,
                s_lse, s_delta, rows_full, rows_free, i_kv_start, i_entry_start, n_entries, n_tiles, W, N, P, i_part,
                n_parts, K, G, R, D,
            )),
            (bring_keys, (
                d_key, d_value, p_lists, p_bounds, s_key, s_value, key_full, value_full, key_free, value_free,
                i_kv_start, n_tiles, N, B, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip
