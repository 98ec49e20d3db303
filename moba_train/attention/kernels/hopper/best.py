"""The best (score, block) pairs of a row, which two neighbouring lanes make of half its blocks each.

A lane keeps R pairs in two tuples of scalars, the best first and of equal ones the earlier block's. LOWEST: no pair.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moba_train.attention.kernels.hopper.lanes import bits_from, neighbour, take_bit


@gluon.jit
def none(R: gl.constexpr, LOWEST: gl.constexpr):
    """Scores and blocks of a lane at the start."""
    best, block = (), ()
    for _k in gl.static_range(R):
        best, block = best + (LOWEST,), block + (0,)
    return best, block


@gluon.jit
def insert(best, block, score, i_block, R: gl.constexpr):
    """Put a pair behind those that are as good, and drop the last."""
    new_best, new_block = (gl.maximum(best[0], score),), (gl.where(score > best[0], i_block, block[0]),)
    for k in gl.static_range(1, R):
        new_best = new_best + (gl.maximum(best[k], gl.minimum(best[k - 1], score)),)
        moved = gl.where(score > best[k - 1], block[k - 1], i_block)
        new_block = new_block + (gl.where(score > best[k], moved, block[k]),)
    return new_best, new_block


@gluon.jit
def row_worst(best, R: gl.constexpr):
    """The R-th best score of a row."""
    worst = gl.maximum(best[0], neighbour(best[R - 1]))
    for k in gl.static_range(1, R):
        worst = gl.minimum(worst, gl.maximum(best[k], neighbour(best[R - 1 - k])))
    return worst


@gluon.jit
def row_choices(best, block, n_blocks, R: gl.constexpr, NONE: gl.constexpr, LOWEST: gl.constexpr):
    """The choices of a row that has n_blocks blocks. Where no score is above LOWEST, the earliest of the other blocks;
    where there are no more blocks, NONE, in the last places. The second lane has all but these in another order."""
    chosen, others = (), -1  # the highest bit is block 0
    for k in gl.static_range(R):
        score, other, i_other = best[k], neighbour(best[R - 1 - k]), neighbour(block[R - 1 - k])
        better = (score > other) | ((score == other) & (block[k] < i_other))
        i_block = gl.where(gl.maximum(score, other) > LOWEST, gl.where(better, block[k], i_other), NONE)
        chosen = chosen + (i_block,)
        others &= ~(bits_from(i_block) ^ bits_from(i_block + 1))
    choices = ()
    for k in gl.static_range(R):
        i_bit, rest = take_bit(others)
        is_none = chosen[k] == NONE
        i_block = gl.where(is_none, 31 - i_bit, chosen[k])
        others = gl.where(is_none, rest, others)
        choices = choices + (gl.where(n_blocks > R, i_block, gl.where(k < n_blocks, k, NONE)),)
    return choices
