"""What the own-block kernels for Hopper share: whom they serve, their tiles of rows, and who copies what those read."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moba_train.attention.kernels.hopper.shared import HALF, bring, described, row_starts, swizzled
from moba_train.attention.kernels.plan import Sizes

TILE_ROWS: gl.constexpr = gl.constexpr(128)  # of a tile: two warpgroups of HALF rows
MOST_CHOICES = 16


def serves(sizes: Sizes) -> bool:
    """Whether whole tokens fill a warpgroup's rows, and the choices' log-sum-exps have room."""
    return HALF.value % sizes.group == 0 and sizes.choose <= MOST_CHOICES


def described_partial(
    partial: torch.Tensor, key: torch.Tensor, sizes: Sizes, rows: int = TILE_ROWS.value
) -> TensorDescriptor:
    """Partial results (rows * R, D) as the copy engine reads them: the r-th of so many rows. R = 0: not read."""
    if not sizes.choose:
        return described(key, rows)
    return described(partial.view(-1, sizes.choose, sizes.head_dim), rows)


def described_rows(tensor: torch.Tensor, sizes: Sizes) -> TensorDescriptor:
    """A (T, H, D) tensor as the copy engine reads it: HALF consecutive rows of a kv head. G divides HALF."""
    tile = (HALF.value // sizes.group, sizes.group, sizes.head_dim)
    layout = swizzled(tile, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(tile), layout)


@gluon.jit
def row_numbers(p_lse, p_delta, p_bounds, p_first, p_of_token, o_row, i_kv, T, G: gl.constexpr):
    """Of rows: where the block begins, how many earlier ones its segment has, log-sum-exp and delta."""
    b_own = gl.load(p_of_token + o_row // G)
    b_begin = gl.load(p_bounds + b_own)
    b_earlier = b_own - gl.load(p_first + b_own)
    b_lse = gl.load(p_lse + i_kv.to(gl.int64) * T * G + o_row)
    b_delta = gl.load(p_delta + i_kv.to(gl.int64) * T * G + o_row)
    return b_begin, b_earlier, b_lse, b_delta


@gluon.jit
def whole_rows(p_rows, n_own, n_stop, i_kv, K, G: gl.constexpr, D: gl.constexpr, WIDE: gl.constexpr):
    """Places of HALF rows of kv head i_kv in a (T, H, D) tensor, and which rows are before row n_stop."""
    o_row = n_own + gl.arange(0, HALF, gl.SliceLayout(1, WIDE))
    o_start = row_starts(o_row, i_kv, K, G, D)
    o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
    return p_rows + (o_start[:, None] + o_d[None, :]), (o_row < n_stop)[:, None]


@gluon.jit
def row_tile(i_tile, n_tiles, n_row_tiles, i_row_start):
    """Kv head, of those at work, and first row of a program's tile. Every other round of the programs is dealt out
    backwards: with blocks about as long as a round, each would get tiles of many keys, or of few, all the time."""
    n_programs = gl.num_programs(0)
    i_round = i_tile // n_programs
    if (i_round % 2 == 1) & ((i_round + 1) * n_programs <= n_tiles):
        i_tile = (i_round + 1) * n_programs - 1 - gl.program_id(0)
    return i_tile // n_row_tiles, i_row_start + i_tile % n_row_tiles * TILE_ROWS


@gluon.jit
def last_token(n_row, T, G: gl.constexpr):
    """Of the tile of rows from n_row on; of those past the last row, the last one's."""
    return gl.minimum((n_row + TILE_ROWS - 1) // G, T - 1)


@gluon.jit
def own_start(p_bounds, p_of_token, n_row, T, G: gl.constexpr):
    """Where the block of a tile's first row starts: its rows read no key before."""
    return gl.load(p_bounds + gl.load(p_of_token + gl.minimum(n_row // G, T - 1)))


@gluon.jit
def number(s_numbers, I_PLACE: gl.constexpr):
    """One of a vector in shared memory."""
    return gl.max(s_numbers.slice(I_PLACE, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def bring_tiles(
    d_key, d_value, d_partial, p_bounds, p_of_token, s_ring, full, free, i_kv_start, i_row_start, n_rows, n_row_tiles,
    n_tiles, T, FORWARD: gl.constexpr, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: each tile's keys, values and partial results in the order of their use. Forward: the partial
    outputs come first, and values one tile after the keys; backward: the partial dQ come last, BLOCK_N rows each."""
    LAG: gl.constexpr = BLOCK_N if FORWARD else 0
    i_item = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        i_column = (i_kv_start + i_part_kv) * D
        n_partial = i_part_kv * n_rows + n_row - i_row_start
        n_start = own_start(p_bounds, p_of_token, n_row, T, G)
        n_stop = last_token(n_row, T, G) + 1
        if FORWARD:
            for i_choice in range(R):
                i_item = bring(d_partial, n_partial, i_choice * D, s_ring, full, free, i_item, STAGES)
        for n_key in range(n_start, n_stop + LAG, BLOCK_N):
            if n_key < n_stop:
                i_item = bring(d_key, n_key, i_column, s_ring, full, free, i_item, STAGES)
            if n_key - LAG >= n_start:
                i_item = bring(d_value, n_key - LAG, i_column, s_ring, full, free, i_item, STAGES)
        if not FORWARD:
            for i_choice in range(R):
                for i_part in gl.static_range(TILE_ROWS // BLOCK_N):
                    n_part = n_partial + i_part * BLOCK_N
                    i_item = bring(d_partial, n_part, i_choice * D, s_ring, full, free, i_item, STAGES)
