"""What the own-block kernels for Hopper share: whom they serve, their tiles of rows, and the keys that those read."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moba_train.attention.kernels.hopper.shared import HALF, described
from moba_train.attention.kernels.plan import Sizes

TILE_ROWS: gl.constexpr = gl.constexpr(128)  # of a tile: two warpgroups of HALF rows
MOST_CHOICES = 16


def serves(sizes: Sizes) -> bool:
    """Whether whole tokens fill a warpgroup's rows, and the choices' log-sum-exps have room. Not for one choice (top_k
    2): these kernels have not been shown right there, Triton's have."""
    return HALF.value % sizes.group == 0 and sizes.choose <= MOST_CHOICES and sizes.choose != 1


def described_partial(partial: torch.Tensor, key: torch.Tensor, sizes: Sizes) -> TensorDescriptor:
    """Partial results (rows * R, D) as the copy engine reads them: the r-th of a tile's rows. R = 0: not read."""
    if not sizes.choose:
        return described(key, TILE_ROWS.value)
    return described(partial.view(-1, sizes.choose, sizes.head_dim), TILE_ROWS.value)


def described_rows(tensor: torch.Tensor, sizes: Sizes) -> TensorDescriptor:
    """A (T, H, D) tensor as the copy engine reads it: HALF consecutive rows of a kv head. G divides HALF."""
    tile = [HALF.value // sizes.group, sizes.group, sizes.head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, getattr(gl, str(tensor.dtype).removeprefix("torch.")))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), tile, layout)


@gluon.jit
def row_tile(i_tile, n_row_tiles, i_row_start):
    """Kv head, of those at work, and first row of a tile."""
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
