"""``select`` on Hopper, for up to MOST_CHOICES choices.

A program runs through items of 4 x 64 rows of one kv head. Four warps have the copy engine bring the representatives,
BLOCK_N blocks at a time. Four warpgroups own 64 rows of an item each, and two neighbouring lanes a row: either keeps
the R best pairs of the blocks it sees, 4 of every 8. Few scores of a tile are among the R best of their row so far:
the hits. A warpgroup puts a tile's scores into shared memory and goes on to the product of the next one, of the next
item after the last: its queries were copied while this item was worked on. While the product runs, lanes compare their
scores with the row's R-th best, which gives a mask of hits, and insert these one at a time, as often as the busiest
lane of the warp asks for: about three times a tile, in long segments. In a tile of many hits, such as the first, those
are left out that R others exceed, as far as the best ones of 16 groups of scores tell. Where a row has R blocks or
fewer, no score matters.

Ties go to the earlier block: a lane sees its blocks in order, and what equals the R-th best is no hit. So choices are
those of the Triton kernel, bit by bit, also where scores are infinite or no numbers.

Work: 2 products of 2 x D operations for each (query, earlier block), about 2 instructions a score, 6 x R an insertion
and 40 x R a row. Bytes: queries once, representatives from L2 once for 256 rows, R small integers written a query.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.hopper import best, lanes
from moba_train.attention.kernels.hopper.hits import FIRST, insert_hits
from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    copy_tile,
    described,
    gather,
    programs,
    reinterpret,
    thread_barrier,
)
from moba_train.attention.kernels.plan import Config
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=256, keys=64, warps=4, stages=3)  # keys: blocks
HEAD_DIMS = (64, 128)
MOST_CHOICES = 16
ROWS: gl.constexpr = gl.constexpr(TILING.rows)


@gluon.jit
def _multiply(b_query, s_high, s_low, full, i_ring, m_tile, b_product, STAGES: gl.constexpr):
    """Start on the scores of a tile, as soon as it is there; where there is none, on what is there."""
    i_slot = i_ring % STAGES
    mbarrier.wait(full.index(i_slot), i_ring // STAGES & 1, pred=m_tile)
    b_product = warpgroup_mma(b_query, s_low.index(i_slot).permute((1, 0)), b_product, use_acc=False, is_async=True)
    return warpgroup_mma(b_query, s_high.index(i_slot).permute((1, 0)), b_product, is_async=True)


@gluon.jit
def _rows(i_item, T, G: gl.constexpr):
    """An item's kv head and first row. The last rows come first: they have most blocks."""
    n_row_tiles = (T * G + ROWS - 1) // ROWS
    return i_item // n_row_tiles, (n_row_tiles - 1 - i_item % n_row_tiles) * ROWS


@gluon.jit
def _item(i_item, p_first, p_of_token, T, G: gl.constexpr, BLOCK_N: gl.constexpr):
    """kv head, first row, first block and number of tiles, at least one."""
    i_kv, n_row = _rows(i_item, T, G)
    n_start = gl.load(p_first + gl.load(p_of_token + n_row // G))
    n_stop = gl.load(p_of_token + gl.minimum(n_row + ROWS - 1, T * G - 1) // G)
    return i_kv, n_row, n_start, lanes.uniform(gl.maximum((n_stop - n_start + BLOCK_N - 1) // BLOCK_N, 1))


@gluon.jit
def _store_choices(p_choice, s_rows, choices, n_row, i_kv, i_thread, T, G: gl.constexpr, R: gl.constexpr):
    """Those of each pair's first lane."""
    SLOTS: gl.constexpr = 8 if R <= 8 else 16
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, SLOTS], [16, 2], [4, 1], [1, 0])
    s_choice = reinterpret(s_rows, gl.int32, [HALF * 2 * SLOTS, 1, 1], PLAIN)
    for k in gl.static_range(R):
        lanes.write(s_choice, i_thread * SLOTS + k, choices[k])
    o_row = n_row + gl.arange(0, HALF, gl.SliceLayout(1, PAIRS))
    o_slot = gl.arange(0, 2 * SLOTS, gl.SliceLayout(0, PAIRS))
    p_rows = p_choice + (i_kv.to(gl.int64) * T * G + o_row)[:, None] * R + o_slot[None, :]
    b_choice = reinterpret(s_rows, gl.int32, [HALF, 2 * SLOTS], PLAIN).load(PAIRS).to(p_choice.dtype.element_ty)
    gl.store(p_rows, b_choice, mask=(o_row < T * G)[:, None] & (o_slot < R)[None, :])


@gluon.jit
def _bring_queries(p_query, s_queries, i_item, T, K, I_GROUP: gl.constexpr, G: gl.constexpr, D: gl.constexpr):
    """Have HALF rows (HALF, D) of an item brought; of the last one where there is none."""
    QUERIES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i_kv, n_row = _rows(gl.minimum(i_item, (T * G + ROWS - 1) // ROWS * K - 1), T, G)
    n_row = gl.minimum(n_row + I_GROUP * HALF, T * G - 1)
    p_query += (n_row // G).to(gl.int64) * K * G * D + i_kv * G * D
    i_row = n_row % G + gl.minimum(gl.arange(0, HALF, gl.SliceLayout(1, QUERIES)), T * G - 1 - n_row)
    o_query = (i_row // G * K * G + i_row % G)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, QUERIES))[None, :]
    gather(s_queries, p_query + o_query)
    async_copy.commit_group()


@gluon.jit
def _take_queries(p_query, s_queries, i_next, T, K, I_GROUP: gl.constexpr, G: gl.constexpr, D: gl.constexpr):
    """The rows that were brought, in registers, and item i_next's on their way."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    async_copy.wait_group(0)
    thread_barrier()
    b_query = s_queries.load(gl.DotOperandLayout(0, PRODUCT, 2))
    thread_barrier()
    _bring_queries(p_query, s_queries, i_next, T, K, I_GROUP, G, D)
    return b_query


@gluon.jit
def _choose(
    p_query, p_first, p_of_token, p_choice, s_query, s_shared, s_high, s_low, full, free, T, K, I_GROUP: gl.constexpr,
    G: gl.constexpr, R: gl.constexpr, NONE: gl.constexpr, LOWEST: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF rows of every item. Past the last row it repeats, and is not stored."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_rows = s_shared.index(I_GROUP)  # an item's tiles of scores and its choices, in turn
    s_queries = s_query.index(I_GROUP)
    s_score = reinterpret(s_rows, gl.float32, [HALF * BLOCK_N, 1, 1], PLAIN)
    s_fours = reinterpret(s_rows, gl.float32, [HALF * BLOCK_N // 4, 1, 4], PLAIN)
    i_thread = lanes.thread()
    i_row, i_half = i_thread // 2, i_thread % 2
    # A lane's scores lie here, once ``_column`` is brought in by an exclusive or.
    o_lane = i_row * BLOCK_N + i_half * 4 ^ i_row % 4 * 8 ^ FIRST
    n_last = T * G - 1
    n_items = lanes.uniform((T * G + ROWS - 1) // ROWS * K)
    n_ring = 0
    _bring_queries(p_query, s_queries, gl.program_id(0), T, K, I_GROUP, G, D)
    b_query = _take_queries(p_query, s_queries, gl.program_id(0) + gl.num_programs(0), T, K, I_GROUP, G, D)
    b_product = gl.zeros([HALF, BLOCK_N], gl.float32, PRODUCT)
    b_product = _multiply(b_query, s_high, s_low, full, 0, n_items > 0, b_product, STAGES)
    b_product = warpgroup_mma_wait(0, deps=[b_product])
    for i_item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        i_kv, n_row, n_start, n_tiles = _item(i_item, p_first, p_of_token, T, G, BLOCK_N)
        n_ring = lanes.uniform(n_ring)
        n_row += I_GROUP * HALF
        i_next = i_item + gl.num_programs(0)
        # From n_shared to i_own_low every row may choose every block: no mask there.
        i_own_low = lanes.uniform(gl.load(p_of_token + gl.minimum(n_row, n_last) // G))
        n_shared = lanes.uniform(gl.load(p_first + gl.load(p_of_token + gl.minimum(n_row + HALF - 1, n_last) // G)))
        i_own = gl.load(p_of_token + gl.minimum(n_row + i_row, n_last) // G)
        i_first = gl.load(p_first + i_own)
        i_stop = gl.where(i_own - i_first > R, i_own, i_first)  # of R blocks or fewer it has all, whatever the scores
        scores, blocks = best.none(R, LOWEST)
        worst = LOWEST
        for i_tile in range(n_tiles - 1):
            s_rows.store(b_product)
            mbarrier.arrive(free.index((n_ring + i_tile) % STAGES), count=1)
            b_next = _multiply(b_query, s_high, s_low, full, n_ring + i_tile + 1, True, b_product, STAGES)
            scores, blocks, worst = insert_hits(
                scores, blocks, worst, s_score, s_fours, o_lane, i_half, i_tile, n_start + i_tile * BLOCK_N, n_shared,
                i_own_low, i_first, i_stop, R, LOWEST, BLOCK_N,
            )  # fmt: skip
            b_product = warpgroup_mma_wait(0, deps=[b_next])
        n_ring += n_tiles
        s_rows.store(b_product)
        mbarrier.arrive(free.index((n_ring - 1) % STAGES), count=1)
        b_query = _take_queries(p_query, s_queries, i_next + gl.num_programs(0), T, K, I_GROUP, G, D)
        b_next = _multiply(b_query, s_high, s_low, full, n_ring, i_next < n_items, b_product, STAGES)
        scores, blocks, worst = insert_hits(
            scores, blocks, worst, s_score, s_fours, o_lane, i_half, n_tiles - 1, n_start + (n_tiles - 1) * BLOCK_N,
            n_shared, i_own_low, i_first, i_stop, R, LOWEST, BLOCK_N,
        )  # fmt: skip
        blocks = [(block ^ FIRST) + (n_start - i_first + 4 * i_half) for block in blocks]  # from the segment's first
        choices = best.row_choices(scores, blocks, i_own - i_first, R, NONE, LOWEST)
        _store_choices(p_choice, s_rows, choices, n_row, i_kv, i_thread, T, G, R)
        b_product = warpgroup_mma_wait(0, deps=[b_next])
    async_copy.wait_group(0)


@gluon.jit
def _load_tiles(
    d_high, d_low, p_first, p_of_token, s_high, s_low, full, free, T, N, K, G: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warps: the items' tiles of representatives, each as soon as its buffers are free."""
    n_ring = 0
    for i_item in range(gl.program_id(0), lanes.uniform((T * G + ROWS - 1) // ROWS * K), gl.num_programs(0)):
        i_kv, _, n_start, n_tiles = _item(i_item, p_first, p_of_token, T, G, BLOCK_N)
        n_ring = lanes.uniform(n_ring)
        for i_tile in range(n_tiles):
            i_slot, n_block = (n_ring + i_tile) % STAGES, i_kv * N + n_start + i_tile * BLOCK_N
            mbarrier.wait(free.index(i_slot), ((n_ring + i_tile) // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(i_slot), 2 * d_high.block_type.nbytes)
            copy_tile(d_low, [n_block, 0], full.index(i_slot), s_low.index(i_slot))
            copy_tile(d_high, [n_block, 0], full.index(i_slot), s_high.index(i_slot))
        n_ring += n_tiles


@gluon.jit(do_not_specialize=NUMBERS)
def select_hopper_kernel(
    d_high,
    d_low,
    p_query,
    p_first,
    p_of_token,
    p_choice,
    T,
    N,
    K,
    G: gl.constexpr,
    R: gl.constexpr,
    NONE: gl.constexpr,
    LOWEST: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    s_query = gl.allocate_shared_memory(
        p_query.dtype.element_ty, [4, HALF, D], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    s_shared = gl.allocate_shared_memory(gl.float32, [4, HALF, BLOCK_N], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    s_high = gl.allocate_shared_memory(d_high.dtype, [STAGES, BLOCK_N, D], d_high.layout)
    s_low = gl.allocate_shared_memory(d_high.dtype, [STAGES, BLOCK_N, D], d_low.layout)
    full, free = barriers(1, STAGES), barriers(4, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_choose, (
                p_query, p_first, p_of_token, p_choice, s_query, s_shared, s_high, s_low, full,
                free, T, K, 0, G, R, NONE, LOWEST, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, s_query, s_shared, s_high, s_low, full,
                free, T, K, 1, G, R, NONE, LOWEST, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, s_query, s_shared, s_high, s_low, full,
                free, T, K, 2, G, R, NONE, LOWEST, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, s_query, s_shared, s_high, s_low, full,
                free, T, K, 3, G, R, NONE, LOWEST, D, BLOCK_N, STAGES,
            )),
            (_load_tiles, (
                d_high, d_low, p_first, p_of_token, s_high, s_low, full, free, T, N, K, G, BLOCK_N, STAGES,
            )),
        ],
        [4, 4, 4, 4],
        [112, 112, 112, 24],
    )  # fmt: skip


def serves(query: Tensor, choose: int) -> bool:
    """Whether this kernel takes the query (T, H, D) and R choices."""
    return query.shape[-1] in HEAD_DIMS and choose <= MOST_CHOICES


def launch(query: Tensor, high: Tensor, low: Tensor, blocks: Blocks, choices: Tensor, **constants: Any) -> None:
    """Fill in choices."""
    tokens, heads, head_dim = query.shape
    kv_heads, count, _ = high.shape
    group = heads // kv_heads
    tiles = (described(part.view(kv_heads * count, 1, head_dim), TILING.keys) for part in (high, low))
    items = triton.cdiv(tokens * group, TILING.rows) * kv_heads
    select_hopper_kernel[(min(items, programs(query.device)),)](
        *tiles, query, blocks.first, blocks.of_token, choices, tokens, count, kv_heads, G=group,
        R=choices.shape[-1], D=head_dim, BLOCK_N=TILING.keys, STAGES=TILING.stages, num_warps=TILING.warps,
        **constants,
    )  # fmt: skip
