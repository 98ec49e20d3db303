"""``resident_forward`` on Hopper, for blocks of 128 keys.

A program owns a list and keeps the block's keys and values. Its four warps gather the queries of the entries, 64 at a
time, STAGES - 1 tiles ahead: while one tile is multiplied, the others are on their way. Results go out as whole rows,
by way of the queries' place. Two programs share a multiprocessor: one computes while the other waits.

The programs run over the blocks of one kv head before those of the next: what their entries read and write then stays
in L2 as far as it fits. First of all the log-sum-exps, 4 bytes of a sector of 32 at a time: a sector that leaves before
it is whole is read again, and costs 60 bytes an entry. Results are read much later, and make room first.

Work and bytes are those of the Triton kernel.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    copy_tile,
    described,
    gather,
    load_entries,
    part_bounds,
    row_starts,
    thread_barrier,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=64, keys=128, warps=4, stages=3)
TILINGS = {64: TILING, 128: TILING}  # by head_dim


@gluon.jit(do_not_specialize=NUMBERS)
def resident_forward_hopper_kernel(
    d_key,
    d_value,
    p_query,
    p_bounds,
    p_offsets,
    p_entries,
    p_partial,
    p_partial_lse,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    N,
    P,
    i_part,
    n_parts,
    K,
    G: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_part_kv = gl.program_id(0) // N
    n_start, n_stop = part_bounds(p_offsets, gl.program_id(0), N, P, i_part, n_parts)
    if n_start >= n_stop:
        return
    i_kv = i_kv_start + i_part_kv
    n_token = gl.load(p_bounds + gl.program_id(0) % N)
    o_result = i_part_kv.to(gl.int64) * n_entries - i_entry_start

    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = p_query.dtype.element_ty
    s_key = gl.allocate_shared_memory(TYPE, [BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [BLOCK_N, D], d_value.layout)
    s_rows = gl.allocate_shared_memory(TYPE, [STAGES, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE))
    full = barriers(1, 1)
    fence_async_shared()
    thread_barrier()
    mbarrier.expect(full.index(0), d_key.block_type.nbytes + d_value.block_type.nbytes)
    copy_tile(d_key, [n_token, i_kv * D], full.index(0), s_key)
    copy_tile(d_value, [n_token, i_kv * D], full.index(0), s_value)

    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    for i_tile in gl.static_range(STAGES - 1):
        o_entry, _ = load_entries(p_entries, n_start + i_tile * HALF, n_stop, gl.SliceLayout(1, ROWS))
        o_row = row_starts(o_entry // R, i_kv, K, G, D)
        gather(s_rows.index(i_tile), p_query + (o_row[:, None] + o_d[None, :]))
        async_copy.commit_group()
    # Entries are read a tile ahead: the rows' addresses are there in time.
    o_ahead, _ = load_entries(p_entries, n_start + (STAGES - 1) * HALF, n_stop, gl.SliceLayout(1, ROWS))
    mbarrier.wait(full.index(0), 0)
    i_slot = n_start * 0
    for n_entry in range(n_start, n_stop, HALF):
        o_entry, m_row = load_entries(p_entries, n_entry, n_stop, gl.SliceLayout(1, ROWS))
        o_result_row, m_result_row = load_entries(p_entries, n_entry, n_stop, gl.SliceLayout(1, SCORES))
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        thread_barrier()
        s_query = s_rows.index(i_slot)
        b_scores = warpgroup_mma(s_query, s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)
        # The place of the tile before this one is free. Past the end the last entry's row comes again.
        i_free = gl.where(i_slot == 0, STAGES - 1, i_slot - 1)
        o_row = row_starts(o_ahead // R, i_kv, K, G, D)
        m_ahead = (n_entry + (STAGES - 1) * HALF < n_stop) & (o_row >= 0)
        gather(s_rows.index(i_free), p_query + (o_row[:, None] + o_d[None, :]), mask=m_ahead[:, None])
        async_copy.commit_group()
        o_ahead, _ = load_entries(p_entries, n_entry + STAGES * HALF, n_stop, gl.SliceLayout(1, ROWS))
        b_scores = warpgroup_mma_wait(0, deps=[b_scores])
        b_max = gl.max(b_scores, 1) * scale
        b_weight = gl.exp2(b_scores * scale - b_max[:, None])
        b_sum = gl.sum(b_weight, 1)
        b_left = gl.convert_layout(b_weight.to(TYPE), gl.DotOperandLayout(0, OUT, 2))
        b_out = warpgroup_mma(b_left, s_value, gl.zeros([HALF, D], gl.float32, OUT), use_acc=False, is_async=True)
        p_lse = p_partial_lse + (o_result + o_result_row)
        gl.store(p_lse, b_max + gl.log2(b_sum), mask=m_result_row, eviction_policy="evict_last")
        b_share = gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, OUT))
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        s_query.store((b_out * b_share[:, None]).to(TYPE))
        p_rows = p_partial + ((o_result + o_entry) * D)[:, None] + o_d[None, :]
        gl.store(p_rows, s_query.load(ROWS), mask=m_row[:, None], eviction_policy="evict_first")
        i_slot = gl.where(i_slot == STAGES - 1, 0, i_slot + 1)
    async_copy.wait_group(0)


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, programs: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the blocks' bounds on."""
    resident_forward_hopper_kernel[(programs,)](
        described(key, TILING.keys), described(value, TILING.keys), query, *arguments, G=sizes.group, R=sizes.choose,
        D=sizes.head_dim, BLOCK_N=TILING.keys, STAGES=TILING.stages, num_warps=TILING.warps,
    )  # fmt: skip
