"""``query`` for short blocks, where what comes before and after a tile of entries weighs most.

Programs, tiles and copying warps are those of ``query``. Keys come 64 at a time, as in ``query_narrow``: a warpgroup
then has registers for a tile's gradients, whose place in shared memory is free at once for the next tile's, and starts
the next keys' scores behind this product.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from moba_train.attention.kernels.hopper.query_loads import all_places, bring_keys, gather_half, gather_queries
from moba_train.attention.kernels.hopper.query_narrow import add_keys, start_scores
from moba_train.attention.kernels.hopper.shared import HALF, barriers, gather, thread_barrier
from moba_train.attention.kernels.plan import Config
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=128, keys=64, warps=4, stages=4)


@gluon.jit
def _gather_rows(
    p_query, p_d_out, p_lse, p_delta, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place, s_lse,
    s_delta, rows_full, rows_free, grads_full, grads_free, i_kv_start, i_entry_start, n_entries, n_tiles, W, N, P,
    i_part, n_parts, K, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The gathering warps: a tile's queries, of which two tiles have room, and the places of its results, past the
    list's end less than 0; then its gradients with their log-sum-exps and deltas."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_kv, o_result = gather_queries(
            p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free, i_tile, i_turn,
            i_kv_start, i_entry_start, n_entries, N, P, i_part, n_parts, K, G, R, D,
        )  # fmt: skip
        i_buffer = i_turn % 2 * 2
        mbarrier.wait(grads_free.index(0), (i_turn & 1) ^ 1)
        for i_own in gl.static_range(2):
            o_entry = all_places(s_place.index(i_buffer + i_own), VECTOR) - o_result
            o_sums = i_kv.to(gl.int64) * W + o_entry // R
            gather(s_lse.index(i_own), p_lse + o_sums)
            gather(s_delta.index(i_own), p_delta + o_sums)
            gather_half(p_d_out, s_place.index(i_buffer + i_own), s_d_out.index(i_own), i_kv, o_result, K, G, R, D)
        async_copy.wait_group(0)
        thread_barrier()  # all of the warps' copies are there
        mbarrier.arrive(grads_full.index(0), count=1)
        i_turn += 1


@gluon.jit
def _sum_query(
    p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_key, s_value, key_full, value_full, key_free,
    value_free, rows_full, rows_free, grads_full, grads_free, scale, n_tiles, I_OWN: gl.constexpr, LOG2_E: gl.constexpr,
    B: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = s_query.dtype
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    i_item, i_turn = n_tiles * 0, n_tiles * 0
    for _i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_rows = i_turn % 2 * 2 + I_OWN
        s_rows = s_query.index(i_rows)
        mbarrier.wait(grads_full.index(0), i_turn & 1)
        b_d_out = s_d_out.index(I_OWN).load(gl.DotOperandLayout(0, SCORES, 2))
        b_lse = s_lse.index(I_OWN).load(gl.SliceLayout(1, SCORES))
        b_delta = s_delta.index(I_OWN).load(gl.SliceLayout(1, SCORES))
        mbarrier.arrive(grads_free.index(0), count=1)
        mbarrier.wait(rows_full.index(i_turn % 2), i_turn // 2 & 1)
        b_scores, b_d_weight = start_scores(
            s_rows, b_d_out, s_key, s_value, key_full, value_full, i_item, SCORES, BLOCK_N, STAGES
        )
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
        for _ in range(BLOCK_N, B, BLOCK_N):
            b_d_query = add_keys(
                b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_key, value_free, i_item, scale, STAGES
            )
            b_scores, b_d_weight = start_scores(
                s_rows, b_d_out, s_key, s_value, key_full, value_full, i_item + 1, SCORES, BLOCK_N, STAGES
            )
            b_scores, b_d_query = warpgroup_mma_wait(1, deps=[b_scores, b_d_query])
            mbarrier.arrive(key_free.index(i_item % STAGES), count=1)
            i_item += 1
        b_d_query = add_keys(b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_key, value_free, i_item, scale, STAGES)
        b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
        mbarrier.arrive(key_free.index(i_item % STAGES), count=1)
        # The queries are read no more: their place serves to store whole rows.
        s_rows.store((b_d_query * (scale / LOG2_E)).to(TYPE))
        o_place = s_place.index(i_rows).load(gl.SliceLayout(1, ROWS))
        p_rows = p_partial + (o_place.to(gl.int64) * D)[:, None] + o_d[None, :]
        gl.store(p_rows, s_rows.load(ROWS), mask=(o_place >= 0)[:, None])
        mbarrier.arrive(rows_free.index(i_turn % 2), count=1)
        i_item += 1
        i_turn += 1


@gluon.jit(do_not_specialize=NUMBERS)
def routed_query_short_hopper_kernel(
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
    s_query = gl.allocate_shared_memory(TYPE, [4, HALF, D], ROWS)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_place = gl.allocate_shared_memory(gl.int32, [4, HALF], NUMBER)
    s_lse = gl.allocate_shared_memory(gl.float32, [2, HALF], NUMBER)
    s_delta = gl.allocate_shared_memory(gl.float32, [2, HALF], NUMBER)
    s_key = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_value.layout)
    key_full, value_full, key_free, value_free = (
        barriers(1, STAGES), barriers(1, STAGES), barriers(2, STAGES), barriers(2, STAGES)
    )  # fmt: skip
    rows_full, rows_free, grads_full, grads_free = barriers(1, 2), barriers(2, 2), barriers(1, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_key, s_value, key_full, value_full, key_free,
                value_free, rows_full, rows_free, grads_full, grads_free, scale, n_tiles, 0, LOG2_E, B, D, BLOCK_N,
                STAGES,
            )),
            (_sum_query, (
                p_partial, s_query, s_d_out, s_place, s_lse, s_delta, s_key, s_value, key_full, value_full, key_free,
                value_free, rows_full, rows_free, grads_full, grads_free, scale, n_tiles, 1, LOG2_E, B, D, BLOCK_N,
                STAGES,
            )),
            (_gather_rows, (
                p_query, p_d_out, p_lse, p_delta, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place,
                s_lse, s_delta, rows_full, rows_free, grads_full, grads_free, i_kv_start, i_entry_start, n_entries,
                n_tiles, W, N, P, i_part, n_parts, K, G, R, D,
            )),
            (bring_keys, (
                d_key, d_value, p_lists, p_bounds, s_key, s_value, key_full, value_full, key_free, value_free,
                i_kv_start, n_tiles, N, B, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip
