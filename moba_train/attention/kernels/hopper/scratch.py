"""Shared memory in which every lane reads and writes where it likes: Gluon has no words for that.

An address is the bytes from the start of the program's shared memory: what is kept there must be the first, or the
only, memory that the program allocates. Calls stay in the order in which they are written.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def add(b_address, b_number):
    """Add to integers; nothing where the number is 0."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; setp.ne.s32 p, $2, 0; mov.u32 a, global_smem; add.s32 a, a, $1;"
        "@p red.shared.add.u32 [a], $2; mov.u32 $0, 0; }", "=r,r,r", [b_address, b_number], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def set_bits(b_address, b_bits):
    """Set bits of integers; nothing where there are none."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; setp.ne.s32 p, $2, 0; mov.u32 a, global_smem; add.s32 a, a, $1;"
        "@p red.shared.or.b32 [a], $2; mov.u32 $0, 0; }", "=r,r,r", [b_address, b_bits], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load(b_address):
    """Integers."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a; mov.u32 a, global_smem; add.s32 a, a, $1; ld.volatile.shared.u32 $0, [a]; }", "=r,r",
        [b_address], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_short(b_address):
    """Integers of 2 bytes without a sign."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a; .reg .b16 s; mov.u32 a, global_smem; add.s32 a, a, $1; ld.volatile.shared.u16 s, [a];"
        "cvt.u32.u16 $0, s; }", "=r,r", [b_address], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store(b_address, b_number, mask):
    """Integers, where the mask is true."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; setp.ne.s32 p, $3, 0; mov.u32 a, global_smem; add.s32 a, a, $1;"
        "@p st.volatile.shared.u32 [a], $2; mov.u32 $0, 0; }", "=r,r,r,r", [b_address, b_number, mask.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_short(b_address, b_number, mask):
    """The low 2 bytes of integers, where the mask is true."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a; .reg .b16 s; setp.ne.s32 p, $3, 0; mov.u32 a, global_smem; add.s32 a, a, $1;"
        "cvt.u16.u32 s, $2; @p st.volatile.shared.u16 [a], s; mov.u32 $0, 0; }", "=r,r,r,r",
        [b_address, b_number, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def warp_barrier():
    """What the warp's lanes wrote before is there for those that read after."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
