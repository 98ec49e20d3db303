"""The reference against the definition spelled out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attention.cases import Case, assert_close, attend
from moba_train.attention import AttentionSpec
from moba_train.attention.reference import reference

TINY = [
    Case("one_document", (13,), heads=2, kv_heads=1, head_dim=4, block_size=3, top_k=2),
    Case("documents", (5, 0, 1, 9), heads=4, kv_heads=2, head_dim=3, block_size=2, top_k=3),
    Case("own_block_only", (7, 4), heads=1, kv_heads=1, head_dim=4, block_size=3, top_k=1),
    Case("blocks_of_one", (8,), heads=2, kv_heads=2, head_dim=4, block_size=1, top_k=3),
    Case("covers_everything", (9,), heads=2, kv_heads=1, head_dim=4, block_size=3, top_k=3),
]


def token_by_token(query, key, value, cu_seqlens, max_seqlen, spec, scale) -> Tensor:
    """The definition as a loop over documents, tokens and heads; keys are listed one by one."""
    tokens, heads, _ = query.shape
    group = heads // key.shape[1]
    bounds = cu_seqlens.tolist()
    rows = []
    for t in range(tokens):
        start = max(b for b in bounds[:-1] if b <= t)
        for h in range(heads):
            k, v, q = key[:, h // group], value[:, h // group], query[t, h]
            if spec.kind == "full":
                read = list(range(start, t + 1))
            else:
                size, top_k = spec.moba
                own = (t - start) // size
                blocks = [range(start + n * size, start + (n + 1) * size) for n in range(own)]
                score = [float(sum(k[i] for i in block).detach() @ q.detach()) / size for block in blocks]
                best = sorted(range(own), key=lambda n: (-score[n], n))[: top_k - 1]
                read = [i for n in sorted(best) for i in blocks[n]] + list(range(start + own * size, t + 1))
            weights = torch.stack([q @ k[i] * scale for i in read]).exp()
            rows.append(sum(w * v[i] for w, i in zip(weights, read, strict=True)) / weights.sum())
    return torch.stack(rows).view(query.shape)


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.parametrize("kind", ["moba", "full"])
def test_reference_is_the_definition(case, kind):
    spec = case.spec if kind == "moba" else AttentionSpec("full")
    tensors = tuple(x.double() for x in case.tensors())
    assert_close(attend(reference, case, spec, tensors), attend(token_by_token, case, spec, tensors), 1e-12)


def test_ties_go_to_the_earlier_block():
    """All keys equal, so all scores are: the values that are read tell the blocks."""
    query = torch.randn(20, 2, 4)
    key = torch.ones(20, 1, 4)
    value = torch.eye(20)[:, None, :4].contiguous()  # tokens 0..3, the first block, are the only ones not 0
    out = reference(query, key, value, torch.tensor([0, 20], dtype=torch.int32), 20, AttentionSpec("moba", 4, 2), 0.5)
    expected = torch.tensor([1 / (4 + t % 4 + 1) for t in range(4, 20)])[:, None, None].expand(16, 2, 4)
    torch.testing.assert_close(out[4:], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    case = TINY[0]
    tensors = case.tensors(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reference(*tensors[:3], case.cu_seqlens(), 13, case.spec, 0.5)
    expected = reference(*(x.float() for x in tensors[:3]), case.cu_seqlens(), 13, case.spec, 0.5)
    assert torch.equal(found, expected.to(dtype))
