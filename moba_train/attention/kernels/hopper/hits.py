"""The hits of a tile of scores: those above a row's R-th best so far. Two neighbouring lanes share a row.

A tile lies in shared memory as 64 rows of 64 scores. A lane sees 4 of every 8 columns, as ``FIRST`` says.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moba_train.attention.kernels.hopper import best, lanes

MANY: gl.constexpr = gl.constexpr(8)  # hits of a lane, besides R / 3: if there are more, it pays to leave some out
# A lane's mask has column 8 a + 4 * (second lane) + b of a tile, b < 4, in bit 31 - 4 a - b: its first one on top. What
# ``_column`` makes of a bit is the column but for an exclusive or with FIRST, and the lane's 4.
FIRST: gl.constexpr = gl.constexpr(0x3B)


@gluon.jit
def _column(i_bit):
    return i_bit + (i_bit & 28)


@gluon.jit
def _columns_before(n_column, i_half):
    """How many of a lane's columns are before column n_column of a tile."""
    n_column = gl.minimum(gl.maximum(n_column, 0), 64)
    return n_column // 8 * 4 + gl.minimum(gl.maximum(n_column % 8 - 4 * i_half, 0), 4)


@gluon.jit
def _compare(b_scores, bound, COMPARE: gl.constexpr):
    """1.0 or 0.0: what is multiplied and added runs at twice the rate of what is chosen."""
    return gl.inline_asm_elementwise(
        "set." + COMPARE + ".f32.f32 $0, $1, $2;", "=f,f,f", [b_scores, bound], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _mask(s_fours, o_lane, bound, COMPARE: gl.constexpr):
    """A lane's scores that are better than the bound ("gt"), or as good ("ge")."""
    o_fours = (lanes.after_others(o_lane) ^ FIRST) // 4
    mask = 0
    for i_part in gl.static_range(2):  # a float has bits for half of them
        b_bits = _compare(lanes.read_four(s_fours, o_fours ^ 8 * i_part), bound, COMPARE)
        for i_four in gl.static_range(1, 4):
            b_four = lanes.read_four(s_fours, o_fours ^ 2 * (4 * i_part + i_four))
            b_bits = b_bits * 16.0 + _compare(b_four, bound, COMPARE)
        o_bit = 3 - gl.arange(0, 4, gl.SliceLayout(0, b_bits.type.layout))
        part = gl.max(gl.sum(b_bits * (1 << o_bit).to(gl.float32)[None, :], 1), 0)
        mask = mask * 65536 + part.to(gl.int32)
    return mask


@gluon.jit
def _bound(s_fours, o_lane, mask, R: gl.constexpr, LOWEST: gl.constexpr):
    """A score that R of a row's hits of a tile equal or exceed: of the best ones of 16 groups, the R-th; LOWEST where
    fewer groups have any."""
    o_fours = (lanes.after_others(o_lane) ^ FIRST) // 4
    groups = ()
    for i_part in gl.static_range(2):
        b_best = _hits(s_fours, o_fours, mask, i_part, LOWEST)
        for i_four in gl.static_range(i_part + 2, 8, 2):
            b_best = gl.maximum(b_best, _hits(s_fours, o_fours, mask, i_four, LOWEST))
        groups = groups + lanes.numbers(gl.maximum(b_best, LOWEST))  # not what is no number
    return best.row_worst(best.sort_eight(groups), R, 8)


@gluon.jit
def _hits(s_fours, o_fours, mask, I_FOUR: gl.constexpr, LOWEST: gl.constexpr):
    """Four of a lane's scores of a tile, LOWEST where the mask does not have them."""
    b_four = lanes.read_four(s_fours, o_fours ^ 2 * I_FOUR)
    b_bit = 1 << 31 - 4 * I_FOUR - gl.arange(0, 4, gl.SliceLayout(0, b_four.type.layout))
    return gl.where((mask & b_bit)[None, :] != 0, b_four, LOWEST)


@gluon.jit
def _next(s_score, o_lane, mask):
    """A lane's first hit: its score, -inf if there is none, its column, and the other hits."""
    i_bit, rest = lanes.take_bit(mask)
    i_column = _column(i_bit)
    score = gl.where(mask != 0, lanes.read(s_score, i_column ^ o_lane), -float("inf"))
    return score, i_column, rest


@gluon.jit
def insert_hits(
    scores, blocks, worst, s_score, s_fours, o_lane, i_half, i_tile, n_block, n_shared, i_own_low, i_first, i_stop,
    R: gl.constexpr, LOWEST: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Carry a tile into a row's best pairs; returns these, and the R-th best score."""
    mask = -1
    if (n_block < n_shared) | (n_block + BLOCK_N > i_own_low):
        mask = lanes.bits_from(_columns_before(i_first - n_block, i_half))
        mask &= ~lanes.bits_from(_columns_before(i_stop - n_block, i_half))
    if (i_tile > 0) | ~lanes.in_any(lanes.count_bits(mask) > MANY + R // 3):  # otherwise all are better
        mask &= _mask(s_fours, o_lane, worst, "gt")
    if lanes.in_any(lanes.count_bits(mask) > MANY + R // 3):
        mask &= _mask(s_fours, o_lane, _bound(s_fours, o_lane, mask, R, LOWEST), "ge")
    while lanes.in_any(mask):
        score, i_column, mask = _next(s_score, o_lane, mask)
        scores, blocks = best.insert(scores, blocks, score, i_tile * BLOCK_N + i_column, R)
    return scores, blocks, best.row_worst(scores, R, R)
