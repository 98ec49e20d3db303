"""``route`` on Hopper: lists are sorted in shared memory, and leave it in runs.

count    a program counts the entries of one part of one kv head by block. Bytes: choices read, P x N x K counters
         written.
fill     a program owns a part of one kv head, its warps a piece of the part each. They bring the blocks that the
         entries name, count them by block and warp, and make of the counters where each warp's entries of each block
         go. Then a warp walks through its piece, up to 16 rows a turn: a row names a block once, so an entry's place
         is the block's counter plus the bits of the turn's rows before its own that chose the block too; the last of
         them moves the counter on. When the part is sorted, each list's run of entries is written at once: 4 bytes at
         a time would take the L2 longer than all the rest. Bytes: choices and offsets read, 4 written an entry.

Between them run ``route``'s kernels that sum up the counters. A list's entries are in ascending order as there.
"""

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.hopper import lanes, scratch
from moba_train.attention.kernels.hopper.shared import thread_barrier
from moba_train.attention.kernels.plan import sorting
from moba_train.attention.kernels.rows import NUMBERS

COUNT_ENTRIES = 1024
COUNT_WARPS = 4
MOST_ROWS = 16  # of a turn: bits of half a number
TURN_ENTRIES = 512  # at most, unless a row has more
STEP = 2048  # the room for entries is a multiple of it: each size is a compilation
NO_BLOCK: gl.constexpr = gl.constexpr((1 << 16) - 1)
BRING: gl.constexpr = gl.constexpr(512)  # entries that a warp brings at a time
LINE: gl.constexpr = gl.constexpr(1024)  # numbers of shared memory that are cleared at a time


@gluon.jit
def _load_choices(p_choice, p_of_token, o_entry, m_entry, GR: gl.constexpr, NONE: gl.constexpr):
    """Each entry's choice and own block; NONE where the mask is false."""
    return gl.load(p_choice + o_entry, m_entry, NONE), gl.load(p_of_token + o_entry // GR, m_entry, 0)


@gluon.jit
def _named_blocks(p_first, b_choice, b_own, NONE: gl.constexpr):
    """The block that each choice names, counted over all segments; -1 where it names none."""
    return gl.where(b_choice == NONE, -1, gl.load(p_first + b_own) + b_choice)


@gluon.jit
def _clear(s_memory, LINES: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for i_line in range(LINES):
        s_memory.index(i_line).store(gl.zeros([LINE], gl.int32, LAYOUT))
    thread_barrier()


@gluon.jit(do_not_specialize=NUMBERS)
def route_count_hopper_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_count,
    W,
    N,
    P,
    n_part,
    R: gl.constexpr,
    GR: gl.constexpr,
    NONE: gl.constexpr,
    BLOCK_E: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    LINES: gl.constexpr = (BLOCK_N + LINE - 1) // LINE
    s_count = gl.allocate_shared_memory(gl.int32, [LINES, LINE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _clear(s_count, LINES)
    i_part, i_kv = gl.program_id(0), gl.program_id(1)
    p_choice += i_kv.to(gl.int64) * W * R
    p_count += (i_kv.to(gl.int64) * P + i_part) * N
    n_stop = gl.minimum((i_part + 1) * n_part, W * R)
    o_place = gl.arange(0, BLOCK_E, LAYOUT)
    for n_entry in range(i_part * n_part, n_stop, BLOCK_E):
        o_entry = n_entry + o_place
        b_choice, b_own = _load_choices(p_choice, p_of_token, o_entry, o_entry < n_stop, GR, NONE)
        b_block = _named_blocks(p_first, b_choice, b_own, NONE)
        scratch.add(gl.maximum(b_block, 0) * 4, (b_block >= 0).to(gl.int32))
    thread_barrier()
    for i_line in range((N + LINE - 1) // LINE):
        o_block = i_line * LINE + gl.arange(0, LINE, LAYOUT)
        b_count = s_count.index(i_line).load(LAYOUT)
        gl.store(p_count + o_block, b_count.to(p_count.dtype.element_ty), mask=o_block < N)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _bring(
    p_choice, p_first, p_of_token, n_start, n_from, n_to, n_piece, i_warp, GR: gl.constexpr, NONE: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """The blocks that the entries n_from to n_to of the part name, and how many of them name each."""
    o_place = gl.arange(0, BRING, gl.SliceLayout(0, n_from.type.layout))[None, :]
    o_entry = n_from + o_place
    b_choice, b_own = _load_choices(p_choice, p_of_token, n_start + o_entry, o_entry < n_to, GR, NONE)
    for n_entry in range(0, n_piece, BRING):
        o_entry = n_from + n_entry + o_place
        b_block = _named_blocks(p_first, b_choice, b_own, NONE)
        m_next = o_entry + BRING < n_to
        b_choice, b_own = _load_choices(p_choice, p_of_token, n_start + o_entry + BRING, m_next, GR, NONE)
        scratch.store_short(BLOCKS + o_entry * 2, b_block, o_entry < n_to)
        scratch.add((i_warp * BLOCK_N + gl.maximum(b_block, 0)) * 4, (b_block >= 0).to(gl.int32))


@gluon.jit
def _place(i_warp, TOTALS: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr):
    """Make places of the counters: the entries of a block follow those of earlier blocks, and of earlier warps."""
    thread_barrier()
    o_block = (
        i_warp * (BLOCK_N // WARPS) + gl.arange(0, BLOCK_N // WARPS, gl.SliceLayout(0, i_warp.type.layout))[None, :]
    )
    b_count = scratch.load(o_block * 4)
    for i_other in gl.static_range(1, WARPS):
        b_count += scratch.load((i_other * BLOCK_N + o_block) * 4)
    b_place = gl.associative_scan(b_count, 1, _plus) - b_count
    # Each warp has some of the blocks: what the others' are.
    scratch.store(TOTALS + i_warp * 4, gl.expand_dims(gl.sum(b_count, 1), 1), i_warp >= 0)
    thread_barrier()
    for i_other in gl.static_range(WARPS):
        b_place += gl.where(i_warp > i_other, scratch.load(TOTALS + i_other * 4 + i_warp * 0), 0)
    for i_other in gl.static_range(WARPS):
        o_counter = (i_other * BLOCK_N + o_block) * 4
        b_count = scratch.load(o_counter)
        scratch.store(o_counter, b_place << 16, o_block >= 0)
        b_place += b_count
    thread_barrier()


@gluon.jit
def _walk(
    n_from, n_to, n_piece, i_warp, R: gl.constexpr, ROWS: gl.constexpr, BLOCK_E: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr, SORTED: gl.constexpr,
):  # fmt: skip
    """Sort the entries n_from to n_to."""
    o_place = gl.arange(0, BLOCK_E, gl.SliceLayout(0, n_from.type.layout))[None, :]
    b_bit = 1 << gl.minimum(o_place // R, ROWS - 1)
    for n_entry in range(0, n_piece, ROWS * R):
        o_entry = n_from + n_entry + o_place
        b_block = scratch.load_short(gl.minimum(BLOCKS + o_entry * 2, SORTED - 2))
        m_named = (o_place < ROWS * R) & (o_entry < n_to) & (b_block != NO_BLOCK)
        o_counter = (i_warp * BLOCK_N + gl.where(m_named, b_block, 0)) * 4
        scratch.set_bits(o_counter, gl.where(m_named, b_bit, 0))
        scratch.warp_barrier()
        b_counter = scratch.load(o_counter)
        b_place = (b_counter >> 16 & 0xFFFF) + lanes.count_bits(b_counter & (b_bit - 1))
        m_last = (b_counter & 0xFFFF & ~(b_bit - 1)) == b_bit
        scratch.warp_barrier()
        scratch.store(o_counter, b_place + 1 << 16, m_named & m_last)
        scratch.store_short(SORTED + b_place * 2, o_entry, m_named)
        scratch.warp_barrier()


@gluon.jit
def _write_runs(
    p_offset, p_entry, n_start, N, BLOCK_N: gl.constexpr, BLOCKS: gl.constexpr, SORTED: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Write the sorted entries: those of a block lie as far from their places in the list as the last one."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    thread_barrier()
    o_line = gl.arange(0, 4 * 32 * WARPS, LAYOUT)
    n_stop = scratch.load(((WARPS - 1) * BLOCK_N + N - 1) * 4) >> 16 & 0xFFFF
    thread_barrier()
    for n_block in range(0, N, 4 * 32 * WARPS):
        o_block = n_block + o_line
        b_stop = gl.load(p_offset + N + o_block, o_block < N, 0)
        b_place = scratch.load(((WARPS - 1) * BLOCK_N + gl.minimum(o_block, N - 1)) * 4) >> 16 & 0xFFFF
        scratch.store(o_block * 4, b_stop - b_place, o_block < N)
    thread_barrier()
    for n_place in range(0, n_stop, 4 * 32 * WARPS):
        o_place = n_place + o_line
        o_entry = scratch.load_short(SORTED + gl.minimum(o_place, n_stop - 1) * 2)
        b_list = scratch.load(scratch.load_short(BLOCKS + o_entry * 2) * 4)
        gl.store(p_entry + b_list + o_place, n_start + o_entry, mask=o_place < n_stop)


@gluon.jit(do_not_specialize=NUMBERS)
def route_fill_hopper_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_offset,
    p_entry,
    W,
    N,
    P,
    n_part,
    R: gl.constexpr,
    GR: gl.constexpr,
    NONE: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_E: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ENTRIES: gl.constexpr,
):
    WARPS: gl.constexpr = gl.num_warps()
    PIECES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    # Bytes from the start of shared memory, where the warps' counters are: blocks that the entries name, sorted
    # entries, and what warps tell each other.
    BLOCKS: gl.constexpr = 4 * WARPS * BLOCK_N
    SORTED: gl.constexpr = BLOCKS + 2 * ENTRIES
    TOTALS: gl.constexpr = SORTED + 2 * ENTRIES
    LINES: gl.constexpr = TOTALS // (4 * LINE) + 1
    s_memory = gl.allocate_shared_memory(gl.int32, [LINES, LINE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    _clear(s_memory, WARPS * BLOCK_N // LINE)
    i_part, i_kv = gl.program_id(0), gl.program_id(1)
    p_choice += i_kv.to(gl.int64) * W * R
    p_offset += (i_kv.to(gl.int64) * (P + 1) + i_part) * N
    n_start = i_part * n_part
    n_piece = (n_part // R + WARPS - 1) // WARPS * R
    # (WARPS, 1), of the part's entries
    i_warp = gl.arange(0, WARPS, gl.SliceLayout(1, PIECES))[:, None]
    n_from = i_warp * n_piece
    n_to = gl.minimum(gl.minimum(n_from + n_piece, n_part), W * R - n_start)
    _bring(p_choice, p_first, p_of_token, n_start, n_from, n_to, n_piece, i_warp, GR, NONE, BLOCK_N, BLOCKS)
    _place(i_warp, TOTALS, BLOCK_N, WARPS)
    _walk(n_from, n_to, n_piece, i_warp, R, ROWS, BLOCK_E, BLOCK_N, BLOCKS, SORTED)
    _write_runs(p_offset, p_entry, n_start, N, BLOCK_N, BLOCKS, SORTED, WARPS)


def serves(blocks: int, entries: int) -> bool:
    """Whether there is room for N blocks and the entries of a part."""
    return entries <= sorting(blocks)[2]


def count(choices: Tensor, blocks: Blocks, counts: Tensor, *numbers: int, **constants: Any) -> None:
    """Fill in counts (K, P, N)."""
    kv_heads, parts, count = counts.shape
    route_count_hopper_kernel[(parts, kv_heads)](
        choices, blocks.first, blocks.of_token, counts, *numbers, **constants, BLOCK_E=COUNT_ENTRIES,
        BLOCK_N=sorting(count)[1], num_warps=COUNT_WARPS,
    )  # fmt: skip


def fill(choices: Tensor, blocks: Blocks, offsets: Tensor, entries: Tensor, *numbers: int, **constants: Any) -> None:
    """Fill in entries."""
    kv_heads, stops, count = offsets.shape
    choose = choices.shape[-1]
    warps, block_n, _ = sorting(count)
    room = triton.cdiv(numbers[-1], STEP) * STEP
    rows = 1 << (min(MOST_ROWS, max(1, TURN_ENTRIES // choose)).bit_length() - 1)
    route_fill_hopper_kernel[(stops - 1, kv_heads)](
        choices, blocks.first, blocks.of_token, offsets, entries, *numbers, **constants, ROWS=rows,
        BLOCK_E=max(32, triton.next_power_of_2(rows * choose)), BLOCK_N=block_n, ENTRIES=room, num_warps=warps,
    )  # fmt: skip
