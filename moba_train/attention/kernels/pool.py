"""Mean key of every block, in two terms.

One program a (block, kv head) sums the block's keys in fp32, a tile at a time, while the next one is on its way. A
short block is little to bring, so many small programs share a multiprocessor; a token's kv heads are read side by side,
since they lie so. The mean leaves as high + low, both in the keys' half-precision type: high is the mean rounded, low
what the rounding lost, so two tensor-core products give gate scores to about 2^-17 (bf16) of the mean, near what fp32
would give.

Bytes: every key read once; 2 x 2 x N x K x D written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.rows import NUMBERS, load_keys

LONG_BLOCK = 1024  # tokens
SHORT_TILE = (32, 2)  # tokens, warps
LONG_TILE = (64, 4)


@triton.jit(do_not_specialize=NUMBERS)
def _pool_kernel(
    p_key,
    p_bounds,
    p_high,
    p_low,
    N,
    K,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_block, i_kv = tl.program_id(0) // K, tl.program_id(0) % K
    n_start = tl.load(p_bounds + i_block)
    n_stop = tl.load(p_bounds + i_block + 1)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    o_token = tl.arange(0, BLOCK_T)
    b_keys = load_keys(p_key, n_start + o_token, n_stop, i_kv, K, D, BLOCK_D, True)
    for n_token in range(n_start, n_stop, BLOCK_T):
        b_next = load_keys(p_key, n_token + BLOCK_T + o_token, n_stop, i_kv, K, D, BLOCK_D, True)
        b_sum += b_keys.to(tl.float32)
        b_keys = b_next
    # An unused block has no keys; its mean is 0, and no query may choose it.
    b_mean = tl.sum(b_sum, 0) / tl.maximum(n_stop - n_start, 1).to(tl.float32)
    b_high = b_mean.to(p_high.dtype.element_ty)
    b_low = (b_mean - b_high.to(tl.float32)).to(p_low.dtype.element_ty)
    o_mean = (i_kv.to(tl.int64) * N + i_block) * D + o_d
    tl.store(p_high + o_mean, b_high, mask=m_d)
    tl.store(p_low + o_mean, b_low, mask=m_d)


def pool(key: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Representatives (high, low), each (K, N, D) in ``key``'s type; their sum is the mean key of each block.

    Args:
        key: (T, K, D), contiguous.
        blocks: of the segments.
    """
    _, kv_heads, head_dim = key.shape
    count = len(blocks.first)
    high = torch.empty(kv_heads, count, head_dim, dtype=key.dtype, device=key.device)
    low = torch.empty_like(high)
    tile, warps = LONG_TILE if len(key) >= LONG_BLOCK * count else SHORT_TILE
    _pool_kernel[(count * kv_heads,)](
        key,
        blocks.bounds,
        high,
        low,
        count,
        kv_heads,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_T=tile,
        num_warps=warps,
    )
    return high, low
