"""Rows of ``routed_forward`` whose weights left their range, once more.

Hopper's kernel takes weights from the largest score of a block's first key tile. Where later keys score so much more
that a row's sum passes its bound, it writes an infinite log-sum-exp and sets the mark of ``Tiles``. Without it this
kernel ends at once. With it as many programs as multiprocessors look through all tiles, and attend with a running
maximum where a row asks for it.

Work and bytes are those of ``routed_forward`` for the tiles in question, and 4 bytes an entry for the search.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from moba_train.attention.kernels.forward import attend_block, part_bounds
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS, load_rows, row_offsets, store_rows

ROWS = 64  # divides the tiles of all kernels for Hopper


@triton.jit(do_not_specialize=NUMBERS)
def routed_forward_again_kernel(
    p_query,
    p_key,
    p_value,
    p_bounds,
    p_lists,
    p_of_list,
    p_offsets,
    p_entries,
    p_partial,
    p_partial_lse,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    LISTS,
    N,
    P,
    i_part,
    n_parts,
    K,
    TILE: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if tl.load(p_of_list + LISTS + 1) == 0:
        return
    PIECES: tl.constexpr = TILE // BLOCK_M
    for i_piece in range(tl.program_id(0), tl.load(p_of_list + LISTS) * PIECES, tl.num_programs(0)):
        i_tile = i_piece // PIECES
        i_list = tl.load(p_lists + i_tile)
        n_start, n_stop = part_bounds(p_offsets, i_list, N, P, i_part, n_parts)
        n_start += (i_tile - tl.load(p_of_list + i_list)) * TILE + i_piece % PIECES * BLOCK_M
        o_list = n_start + tl.arange(0, BLOCK_M)
        o_entry = tl.load(p_entries + tl.minimum(o_list, n_stop - 1))
        o_partial = (i_list // N).to(tl.int64) * n_entries + (o_entry - i_entry_start)
        m_row = (o_list < n_stop) & (tl.load(p_partial_lse + o_partial) == float("inf"))
        if tl.max(m_row.to(tl.int32), 0) > 0:
            i_kv = i_kv_start + i_list // N
            n_token = tl.load(p_bounds + i_list % N)
            b_query = load_rows(p_query, row_offsets(o_entry // R, i_kv, K, G, D), m_row, D, BLOCK_D, False)
            b_max, b_sum, b_out = attend_block(
                b_query, p_key, p_value, n_token, i_kv, scale, K, B, D, BLOCK_D, BLOCK_M, BLOCK_N
            )
            store_rows(p_partial, o_partial * D, b_out / b_sum[:, None], m_row, D, BLOCK_D)
            tl.store(p_partial_lse + o_partial, b_max + tl.log2(b_sum), mask=m_row)


def launch(*arguments: Any, tile: int, programs: int, config: Config, sizes: Sizes) -> None:
    """Attend the rows whose log-sum-exps are infinite, if there is a mark.

    Args:
        arguments: those of ``routed_forward_kernel``.
        tile: entries of the tiles that these tell of, a multiple of ROWS.
        programs: multiprocessors.
        config: of ``routed_forward_kernel``.
    """
    routed_forward_again_kernel[(programs,)](
        *arguments, TILE=tile, B=sizes.block_size, **sizes.constants(),
        **replace(config, rows=ROWS, warps=4).arguments(),
    )  # fmt: skip
