"""Scalars that are not the same in all lanes of a warp.

Gluon has no word for what one lane does alone. But a scalar is a register of every lane, and nothing makes them equal:
what is made of ``thread()`` differs, and so do loads and stores at a place that depends on it. Only Gluon's barriers
take scalars to be equal: neither a barrier, nor a branch or a loop with one inside, may depend on such a number. A
tensor of one number, or four, is in every lane too, and differs likewise.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def uniform(number):
    """The same number, now known to be one for all lanes: what depends on it stays out of their registers."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def thread():
    """Which of its warpgroup's threads this is."""
    return gl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=gl.int32, is_pure=True, pack=1) & 127


@gluon.jit
def neighbour(number):
    """The number of the other lane of a pair."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=r,r", [number], dtype=number.dtype, is_pure=False, pack=1
    )


@gluon.jit
def in_any(condition):
    """Whether it holds in any lane of the warp."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }", "=r,r",
        [condition.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    ) != 0  # fmt: skip


@gluon.jit
def after_others(number):
    """The same number, once all lanes are here. Loads at a place that depends on it are made after it: they neither
    come before nor keep their addresses, and what they bring, in registers from before."""
    return gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def count_bits(mask):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [mask], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def take_bit(mask):
    """Which bit is the highest, -1 if there is none, and the others."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 b; bfind.u32 $0, $2; shl.b32 b, 1, $0; xor.b32 $1, $2, b; }", "=&r,=r,r", [mask],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def bits_from(n_bit):
    """All but the n_bit highest bits; none from 32 on. Triton's shifts end before 32."""
    return gl.inline_asm_elementwise("shr.u32 $0, -1, $1;", "=r,r", [n_bit], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def read(s_numbers, i_number):
    """A number of (numbers, 1, 1)."""
    ONE: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [4, 1], [1, 0])
    return gl.max(gl.max(s_numbers.index(i_number).load(ONE), 1), 0)


@gluon.jit
def read_four(s_fours, i_four):
    """(1, 4) of (fours, 1, 4)."""
    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    return s_fours.index(i_four).load(FOUR)


@gluon.jit
def numbers(b_four):
    """Those of (1, 4) floats."""
    return _number(b_four, 0), _number(b_four, 1), _number(b_four, 2), _number(b_four, 3)


@gluon.jit
def _number(b_four, I_NUMBER: gl.constexpr):
    m_number = gl.arange(0, 4, gl.SliceLayout(0, b_four.type.layout)) == I_NUMBER
    bits = gl.where(m_number[None, :], b_four.to(gl.int32, bitcast=True), 0)
    return gl.sum(gl.sum(bits, 1), 0).to(gl.float32, bitcast=True)


@gluon.jit
def write(s_numbers, i_number, number):
    """Into (numbers, 1, 1)."""
    ONE: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [4, 1], [1, 0])
    s_numbers.index(i_number).store(gl.full([1, 1], number, s_numbers.dtype, ONE))
