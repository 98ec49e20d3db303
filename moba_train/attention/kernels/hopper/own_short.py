"""``own_query`` for short blocks and head_dim 64, where what comes before and after a tile's keys weighs most.

Programs and warps are those of ``own_forward``. Keys come 64 at a time: a warpgroup then has registers for its rows'
gradients, so that the next tile's can come at once, and starts the next keys' scores behind this product. Two tiles of
queries have room. The R partial dQ are added last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.own import (
    TILE_ROWS,
    bring_tiles,
    last_token,
    number,
    row_numbers,
    row_tile,
    whole_rows,
)
from moba_train.attention.kernels.hopper.shared import HALF, barriers, copy_tile, mask_scores
from moba_train.attention.kernels.plan import Config
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=128, keys=64, warps=4, stages=8)


@gluon.jit
def _bring_rows(
    d_query, d_d_out, p_lse, p_delta, p_bounds, p_first, p_of_token, s_query, s_d_out, s_lse, s_delta, s_begin,
    s_earlier, rows_full, rows_free, grads_full, grads_free, i_kv_start, i_row_start, n_row_tiles, n_tiles, T,
    G: gl.constexpr,
):  # fmt: skip
    """A tile's queries, its gradients, and each row's numbers with these."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    o_vector = gl.arange(0, TILE_ROWS, VECTOR)
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        i_kv = i_kv_start + i_part_kv
        o_row = gl.minimum(n_row + o_vector, T * G - 1)
        b_begin, b_earlier, b_lse, b_delta = row_numbers(
            p_lse, p_delta, p_bounds, p_first, p_of_token, o_row, i_kv, T, G
        )
        i_buffer = i_turn % 2
        mbarrier.wait(rows_free.index(i_buffer), (i_turn // 2 & 1) ^ 1)
        mbarrier.expect(rows_full.index(i_buffer), 2 * d_query.block_type.nbytes)
        for i_half in gl.static_range(2):
            place = [(n_row + i_half * HALF) // G, i_kv * G, 0]
            copy_tile(d_query, place, rows_full.index(i_buffer), s_query.index(i_buffer * 2 + i_half))
        mbarrier.wait(grads_free.index(0), (i_turn & 1) ^ 1)
        mbarrier.expect(grads_full.index(0), 2 * d_query.block_type.nbytes)
        for i_half in gl.static_range(2):
            place = [(n_row + i_half * HALF) // G, i_kv * G, 0]
            copy_tile(d_d_out, place, grads_full.index(0), s_d_out.index(i_half))
        s_begin.store(b_begin)
        s_earlier.store(b_earlier)
        s_lse.store(b_lse)
        s_delta.store(b_delta)
        mbarrier.arrive(grads_full.index(0), count=1)
        i_turn += 1


@gluon.jit
def _start_scores(
    s_rows, b_d_out, s_ring, full, i_item, SCORES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Start the scores of a tile of keys and the gradients of its weights, (HALF, BLOCK_N) each."""
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    i_value = i_item + 1
    s_key, s_value = s_ring.index(i_item % STAGES), s_ring.index(i_value % STAGES)
    mbarrier.wait(full.index(i_item % STAGES), i_item // STAGES & 1)
    b_scores = warpgroup_mma(s_rows, s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)
    mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
    b_d_weight = warpgroup_mma(b_d_out, s_value.permute((1, 0)), b_none, use_acc=False, is_async=True)
    return b_scores, b_d_weight


@gluon.jit
def _add_keys(
    b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_ring, free, i_item, n_key, n_shared, n_first, b_begin, b_token,
    scale, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Start adding a tile of keys to dQ (unscaled). Its scores are there, the gradients of its weights on their way."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(0, b_d_query.type.layout, 2)
    b_scores = mask_scores(b_scores, n_key, n_shared, n_first, b_begin, b_token, BLOCK_N, SCORES)
    b_weight = gl.exp2(b_scores * scale - b_lse[:, None])
    b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
    mbarrier.arrive(free.index((i_item + 1) % STAGES), count=1)
    b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(s_ring.dtype)
    b_left = gl.convert_layout(b_d_scores, RIGHT)
    return warpgroup_mma(b_left, s_ring.index(i_item % STAGES), b_d_query, is_async=True)


@gluon.jit
def _add_block(
    s_rows, b_d_out, s_ring, full, free, i_item, b_lse, b_delta, n_start, n_shared, n_last, n_first, b_begin, b_token,
    scale, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of HALF rows, unscaled, from the keys n_start to n_last, which the ring holds from item i_item on."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    b_scores, b_d_weight = _start_scores(s_rows, b_d_out, s_ring, full, i_item, SCORES, BLOCK_N, STAGES)
    b_scores = warpgroup_mma_wait(1, deps=[b_scores])
    b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
    for n_key in range(n_start, n_last + 1 - BLOCK_N, BLOCK_N):
        b_d_query = _add_keys(
            b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_ring, free, i_item, n_key, n_shared, n_first, b_begin,
            b_token, scale, BLOCK_N, STAGES, SCORES,
        )  # fmt: skip
        b_scores, b_d_weight = _start_scores(s_rows, b_d_out, s_ring, full, i_item + 2, SCORES, BLOCK_N, STAGES)
        b_scores, b_d_query = warpgroup_mma_wait(1, deps=[b_scores, b_d_query])
        mbarrier.arrive(free.index(i_item % STAGES), count=1)
        i_item += 2
    n_last_key = n_start + (n_last - n_start) // BLOCK_N * BLOCK_N
    b_d_query = _add_keys(
        b_d_query, b_scores, b_d_weight, b_lse, b_delta, s_ring, free, i_item, n_last_key, n_shared, n_first, b_begin,
        b_token, scale, BLOCK_N, STAGES, SCORES,
    )  # fmt: skip
    b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
    mbarrier.arrive(free.index(i_item % STAGES), count=1)
    i_item += 2
    return b_d_query, i_item


@gluon.jit
def _sum_query(
    p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, full, free, rows_full, rows_free,
    grads_full, grads_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, I_HALF: gl.constexpr,
    LOG2_E: gl.constexpr, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF rows of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    TYPE: gl.constexpr = s_query.dtype
    i_item, i_turn = i_kv_start * 0, i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        n_own = n_row + I_HALF * HALF
        n_first = n_own // G
        b_token = (n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))) // G
        n_last = last_token(n_row, T, G)
        s_rows = s_query.index(i_turn % 2 * 2 + I_HALF).reshape([HALF, D])
        mbarrier.wait(grads_full.index(0), i_turn & 1)
        n_start, n_shared = number(s_begin, 0), number(s_begin, TILE_ROWS - 1)
        b_begin = s_begin.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_lse = s_lse.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_delta = s_delta.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_earlier = s_earlier.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SUMS))
        b_d_out = s_d_out.index(I_HALF).reshape([HALF, D]).load(LEFT)
        fence_async_shared()  # the copy engine would not wait for loads that are under way
        mbarrier.arrive(grads_free.index(0), count=1)
        mbarrier.wait(rows_full.index(i_turn % 2), i_turn // 2 & 1)
        b_d_query, i_item = _add_block(
            s_rows, b_d_out, s_ring, full, free, i_item, b_lse, b_delta, n_start, n_shared, n_last, n_first, b_begin,
            b_token, scale, D, BLOCK_N, STAGES,
        )  # fmt: skip
        b_d_query = b_d_query * (scale / LOG2_E)
        for i_choice in range(R):
            for i_part in gl.static_range(2):
                i_slot = i_item % STAGES
                mbarrier.wait(full.index(i_slot), i_item // STAGES & 1)
                if i_part == I_HALF:
                    b_partial = s_ring.index(i_slot).load(SUMS).to(gl.float32)
                    fence_async_shared()
                    # What was not chosen was not written either: it may be NaN.
                    b_d_query += gl.where((i_choice < b_earlier)[:, None], b_partial, 0.0)
                mbarrier.arrive(free.index(i_slot), count=1)
                i_item += 1
        # The queries are read no more: their place serves to store whole rows.
        s_rows.store(b_d_query.to(TYPE))
        p_rows, m_rows = whole_rows(p_d_query, n_own, i_row_start + n_rows, i_kv_start + i_part_kv, K, G, D, WIDE)
        gl.store(p_rows, s_rows.load(WIDE), mask=m_rows)
        fence_async_shared()
        mbarrier.arrive(rows_free.index(i_turn % 2), count=1)
        i_turn += 1


@gluon.jit(do_not_specialize=NUMBERS)
def merge_query_short_hopper_kernel(
    d_key,
    d_value,
    d_partial,
    d_query,
    d_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_first,
    p_of_token,
    p_d_query,
    scale,
    i_kv_start,
    i_row_start,
    n_rows,
    T,
    K,
    n_kv,
    LOG2_E: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_row_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    n_tiles = n_row_tiles * n_kv
    TYPE: gl.constexpr = d_key.dtype
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_query = gl.allocate_shared_memory(TYPE, [4, HALF // G, G, D], d_query.layout)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF // G, G, D], d_query.layout)
    s_ring = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [TILE_ROWS], NUMBER)
    s_delta = gl.allocate_shared_memory(gl.float32, [TILE_ROWS], NUMBER)
    s_begin = gl.allocate_shared_memory(gl.int32, [TILE_ROWS], NUMBER)
    s_earlier = gl.allocate_shared_memory(gl.int32, [TILE_ROWS], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(2, STAGES), barriers(1, 2), barriers(2, 2)
    grads_full, grads_free = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, full, free, rows_full,
                rows_free, grads_full, grads_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K,
                0, LOG2_E, G, R, D, BLOCK_N, STAGES,
            )),
            (_sum_query, (
                p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, full, free, rows_full,
                rows_free, grads_full, grads_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K,
                1, LOG2_E, G, R, D, BLOCK_N, STAGES,
            )),
            (_bring_rows, (
                d_query, d_d_out, p_lse, p_delta, p_bounds, p_first, p_of_token, s_query, s_d_out, s_lse, s_delta,
                s_begin, s_earlier, rows_full, rows_free, grads_full, grads_free, i_kv_start, i_row_start, n_row_tiles,
                n_tiles, T, G,
            )),
            (bring_tiles, (
                d_key, d_value, d_partial, p_bounds, p_of_token, s_ring, full, free, i_kv_start, i_row_start, n_rows,
                n_row_tiles, n_tiles, T, False, G, R, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip
