"""``resident_forward`` on Hopper, for blocks of 128 keys.

A program owns a list and keeps the block's keys and values. Four of its warps gather the queries of the entries, 64 at
a time, up to STAGES tiles ahead; the other four make a tile's scores and weights while the weights of the one before
meet the values, and nothing else: addresses, and loads that others hang on, would cost them as much time again. Results
go out as whole rows, by way of the queries' place. Two programs share a multiprocessor: one computes while the other
waits.

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
REGISTERS = 128  # of a thread when two programs start; the warps that gather leave most of theirs to the others
TILINGS = {64: TILING, 128: TILING}  # by head_dim


@gluon.jit
def _gather_rows(
    p_query, p_entries, s_rows, s_place, rows_full, rows_free, n_start, n_stop, i_kv, i_place, K,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gathering warps: the queries of HALF entries after the other, and the places of their results: past the
    list's end the last query comes again, and its result goes to -1. Entries are read two tiles ahead of their use."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    if n_start < n_stop:
        o_entry, _ = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
        o_ahead, _ = load_entries(p_entries, n_start + HALF, n_stop, gl.SliceLayout(1, ROWS))
        o_listed, m_listed = load_entries(p_entries, n_start, n_stop, VECTOR)
        i_turn = n_start * 0
        for n_entry in range(n_start, n_stop, HALF):
            i_slot = i_turn % STAGES
            mbarrier.wait(rows_free.index(i_slot), (i_turn // STAGES & 1) ^ 1)
            o_row = row_starts(o_entry // R, i_kv, K, G, D)
            gather(s_rows.index(i_slot), p_query + (o_row[:, None] + o_d[None, :]))
            async_copy.commit_group()
            s_place.index(i_slot).store(gl.where(m_listed, i_place + o_listed, -1))
            # The tile before this one is there by now.
            async_copy.wait_group(1)
            fence_async_shared()
            thread_barrier()  # all of the warps' copies are fenced
            mbarrier.arrive(rows_full.index((i_turn + STAGES - 1) % STAGES), count=1, pred=i_turn > 0)
            o_entry = o_ahead
            o_ahead, _ = load_entries(p_entries, n_entry + 2 * HALF, n_stop, gl.SliceLayout(1, ROWS))
            o_listed, m_listed = load_entries(p_entries, n_entry + HALF, n_stop, VECTOR)
            i_turn += 1
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(rows_full.index((i_turn + STAGES - 1) % STAGES), count=1)


@gluon.jit
def _softmax(b_scores, scale, TYPE: gl.constexpr, LEFT: gl.constexpr):
    """Weights of a tile's rows, as an operand; the rows' log-sum-exps, and what to multiply their sums by."""
    b_max = gl.max(b_scores, 1) * scale
    b_weight = gl.exp2(b_scores * scale - b_max[:, None])
    b_sum = gl.sum(b_weight, 1)
    return gl.convert_layout(b_weight.to(TYPE), LEFT), b_max + gl.log2(b_sum), 1.0 / b_sum


@gluon.jit
def _store_lse(p_partial_lse, s_place, b_lse):
    o_place = s_place.load(b_lse.type.layout)
    gl.store(p_partial_lse + o_place, b_lse, mask=o_place >= 0, eviction_policy="evict_last")


@gluon.jit
def _store_tile(p_partial, s_place, s_slot, b_out, b_share, D: gl.constexpr):
    """Put a tile's results in their places, whole rows at a time by way of the queries' place."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    OUT: gl.constexpr = b_out.type.layout
    s_slot.store((b_out * gl.convert_layout(b_share, gl.SliceLayout(1, OUT))[:, None]).to(s_slot.dtype))
    o_place = s_place.load(gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_partial + (o_place.to(gl.int64) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_slot.load(ROWS), mask=(o_place >= 0)[:, None], eviction_policy="evict_first")


@gluon.jit
def _attend(
    p_partial, p_partial_lse, s_key, s_value, s_rows, s_place, full, rows_full, rows_free, scale, n_start, n_stop,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warpgroup that computes: a tile's scores and weights while the weights of the one before meet the values."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    TYPE: gl.constexpr = s_rows.dtype
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    b_zero = gl.zeros([HALF, D], gl.float32, OUT)
    if n_start < n_stop:
        mbarrier.wait(full.index(0), 0)
        mbarrier.wait(rows_full.index(0), 0)
        b_scores = warpgroup_mma(s_rows.index(0), s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(0, deps=[b_scores])
        b_left, b_lse, b_share = _softmax(b_scores, scale, TYPE, LEFT)
        _store_lse(p_partial_lse, s_place.index(0), b_lse)
        i_turn = n_start * 0
        for _ in range(n_start + HALF, n_stop, HALF):
            i_slot, i_next = i_turn % STAGES, (i_turn + 1) % STAGES
            mbarrier.wait(rows_full.index(i_next), (i_turn + 1) // STAGES & 1)
            b_scores = warpgroup_mma(s_rows.index(i_next), s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_out = warpgroup_mma(b_left, s_value, b_zero, use_acc=False, is_async=True)
            b_scores = warpgroup_mma_wait(1, deps=[b_scores])
            b_left, b_lse, b_after = _softmax(b_scores, scale, TYPE, LEFT)
            _store_lse(p_partial_lse, s_place.index(i_next), b_lse)
            b_out = warpgroup_mma_wait(0, deps=[b_out])
            _store_tile(p_partial, s_place.index(i_slot), s_rows.index(i_slot), b_out, b_share, D)
            mbarrier.arrive(rows_free.index(i_slot), count=1)
            b_share = b_after
            i_turn += 1
        i_slot = i_turn % STAGES
        b_out = warpgroup_mma(b_left, s_value, b_zero, use_acc=False, is_async=True)
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        _store_tile(p_partial, s_place.index(i_slot), s_rows.index(i_slot), b_out, b_share, D)


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
    n_token = gl.load(p_bounds + gl.program_id(0) % N)
    i_kv = i_kv_start + i_part_kv
    TYPE: gl.constexpr = p_query.dtype.element_ty
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_key = gl.allocate_shared_memory(TYPE, [BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [BLOCK_N, D], d_value.layout)
    s_rows = gl.allocate_shared_memory(TYPE, [STAGES, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE))
    s_place = gl.allocate_shared_memory(gl.int32, [STAGES, HALF], NUMBER)
    full, rows_full, rows_free = barriers(1, 1), barriers(1, STAGES), barriers(1, STAGES)
    fence_async_shared()
    thread_barrier()
    if n_start < n_stop:
        mbarrier.expect(full.index(0), d_key.block_type.nbytes + d_value.block_type.nbytes)
        copy_tile(d_key, [n_token, i_kv * D], full.index(0), s_key)
        copy_tile(d_value, [n_token, i_kv * D], full.index(0), s_value)
    gl.warp_specialize(
        [
            (_attend, (
                p_partial, p_partial_lse, s_key, s_value, s_rows, s_place, full, rows_full, rows_free, scale, n_start,
                n_stop, D, BLOCK_N, STAGES,
            )),
            (_gather_rows, (
                p_query, p_entries, s_rows, s_place, rows_full, rows_free, n_start, n_stop, i_kv,
                i_part_kv * n_entries - i_entry_start, K, G, R, D, STAGES,
            )),
        ],
        [4],
        [32],
    )  # fmt: skip


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, programs: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the blocks' bounds on."""
    resident_forward_hopper_kernel[(programs,)](
        described(key, TILING.keys), described(value, TILING.keys), query, *arguments, G=sizes.group, R=sizes.choose,
        D=sizes.head_dim, BLOCK_N=TILING.keys, STAGES=TILING.stages, num_warps=TILING.warps, maxnreg=REGISTERS,
    )  # fmt: skip
