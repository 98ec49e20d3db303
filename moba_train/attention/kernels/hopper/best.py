"""The best (score, block) pairs of a row, which two neighbouring lanes make of half its blocks each.

A lane keeps R pairs in two tuples of scalars, the best first and of equal ones the earlier block's. LOWEST: no pair.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)
# mypy: disable-error-code="assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moba_train.attention.kernels.hopper.lanes import bits_from, in_any, neighbour, take_bit

# Batcher's odd-even merges of eight numbers: which are compared.
NETWORK: gl.constexpr = gl.constexpr(
    (0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 3, 4, 6, 5, 7, 1, 2, 5, 6, 0, 4, 1, 5, 2, 6, 3, 7, 2, 4, 3, 5, 1, 2, 3, 4, 5, 6)
)


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
def sort_eight(numbers):
    """The highest first."""
    for i in gl.static_range(len(NETWORK) // 2):
        numbers = _exchange(numbers, NETWORK[2 * i], NETWORK[2 * i + 1])
    return numbers


@gluon.jit
def _exchange(numbers, FIRST: gl.constexpr, SECOND: gl.constexpr):
    """The higher of two numbers in the place of the first."""
    result = ()
    for i in gl.static_range(8):
        if i == FIRST:
            result = result + (gl.maximum(numbers[FIRST], numbers[SECOND]),)
        elif i == SECOND:
            result = result + (gl.minimum(numbers[FIRST], numbers[SECOND]),)
        else:
            result = result + (numbers[i],)
    return result


@gluon.jit
def row_worst(best, R: gl.constexpr, KEPT: gl.constexpr):
    """The R-th best score of a row whose lanes keep KEPT each, R or fewer."""
    worst = float("inf")
    for k in gl.static_range(R):
        if k < KEPT and R - 1 - k < KEPT:
            worst = gl.minimum(worst, gl.maximum(best[k], neighbour(best[R - 1 - k])))
        elif k < KEPT:
            worst = gl.minimum(worst, best[k])
        else:
            worst = gl.minimum(worst, neighbour(best[R - 1 - k]))
    return worst


@gluon.jit
def row_choices(best, block, n_blocks, R: gl.constexpr, NONE: gl.constexpr, LOWEST: gl.constexpr):
    """The choices of a row that has n_blocks blocks. Where no score is above LOWEST, the earliest of the other blocks;
    where there are no more blocks, NONE, in the last places. The second lane has all but these in another order."""
    chosen, worst = (), float("inf")
    for k in gl.static_range(R):
        score, other, i_other = best[k], neighbour(best[R - 1 - k]), neighbour(block[R - 1 - k])
        better = (score > other) | ((score == other) & (block[k] < i_other))
        score = gl.maximum(score, other)
        chosen = chosen + (gl.where(score > LOWEST, gl.where(better, block[k], i_other), NONE),)
        worst = gl.minimum(worst, score)
    if in_any((n_blocks > R) & (worst <= LOWEST)):
        chosen = _name_others(chosen, R, NONE)
    choices = ()
    for k in gl.static_range(R):
        choices = choices + (gl.where(n_blocks > R, chosen[k], gl.where(k < n_blocks, k, NONE)),)
    return choices


@gluon.jit
def _name_others(chosen, R: gl.constexpr, NONE: gl.constexpr):
    """The earliest blocks that are not chosen, in the places of NONE."""
    others = -1  # the highest bit is block 0
    for k in gl.static_range(R):
        others &= ~(bits_from(chosen[k]) ^ bits_from(chosen[k] + 1))
    choices = ()
    for k in gl.static_range(R):
        i_bit, rest = take_bit(others)
        is_none = chosen[k] == NONE
        choices = choices + (gl.where(is_none, 31 - i_bit, chosen[k]),)
        others = gl.where(is_none, rest, others)
    return choices
