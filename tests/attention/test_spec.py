from __future__ import annotations

import pytest
import torch

from moba_train.attention import AttentionSpec, full_attention, moba_attention

GOOD = {"query": torch.zeros(6, 4, 8), "key": torch.zeros(6, 2, 8), "value": torch.zeros(6, 2, 8)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear",), "kind: unknown attention 'linear'; choose from full, moba"),
        (("moba", 0, 2), "block_size is 0; give an integer of at least 1"),
        (("moba", 16, 0), "top_k is 0"),
        (("moba", 16, float("inf")), "top_k is inf"),
        (("moba", 16, True), "top_k is True"),
        (("moba", 16), "top_k is None"),
        (("full", 16), "block_size is 16 with kind full"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "-".join(map(str, value)),
)
def test_a_wrong_spec_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(*arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(6, 32)}, r"query has shape \(6, 32\); give \(tokens, heads, head_dim\)"),
        ({"query": torch.zeros(6, 4, 8, dtype=torch.long)}, "query has dtype torch.int64"),
        ({"query": torch.zeros(6, 4, 8).to(torch.float8_e4m3fn)}, "float8_e4m3fn; give bfloat16, float16, float32"),
        ({"key": torch.zeros(6, 2, 8).half()}, "key has dtype torch.float16 and query torch.float32"),
        ({"value": torch.zeros(6, 2, 8, device="meta")}, "value is on meta and query on cpu"),
        ({"value": torch.zeros(6, 4, 8)}, r"value has shape \(6, 4, 8\) and key \(6, 2, 8\)"),
        ({"query": torch.zeros(0, 4, 8)}, r"query has shape \(0, 4, 8\); give at least one token"),
        ({"query": torch.zeros(7, 4, 8)}, r"key has shape \(6, 2, 8\) and query \(7, 4, 8\)"),
        ({"query": torch.zeros(6, 5, 8)}, "key has 2 heads and query 5"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens is a list; give a tensor"),
        ({"cu_seqlens": torch.tensor([6])}, r"cu_seqlens has shape \(1,\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens has dtype torch.int64; give torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32, device="meta")}, "cu_seqlens is on meta"),
        ({"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}, "cu_seqlens starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens ends at 5 and query has 6 tokens"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "cu_seqlens falls from 4 to 2 at index 2"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else value.split(";")[0][:40],
)
def test_wrong_tensors_are_refused_by_name_and_value(changed, message):
    arguments = {**GOOD, **changed}
    with pytest.raises(ValueError, match=message):
        moba_attention(**arguments, block_size=4, top_k=2)
    with pytest.raises(ValueError, match=message):
        full_attention(**arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["auto", "varlen", "reference"])
def test_a_scale_that_is_no_number_above_0_is_refused(scale, backend):
    message = f"scale is {scale}; give a finite number above 0"
    with pytest.raises(ValueError, match=message):
        moba_attention(**GOOD, block_size=4, top_k=2, scale=scale, backend=backend)
    with pytest.raises(ValueError, match=message):
        full_attention(**GOOD, scale=scale, backend=backend)


def test_without_bounds_all_tokens_are_one_segment():
    query, key = torch.randn(20, 4, 8), torch.randn(20, 2, 8)
    one = moba_attention(query, key, key, block_size=4, top_k=2, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    assert torch.equal(moba_attention(query, key, key, block_size=4, top_k=2), one)
