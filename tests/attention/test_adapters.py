"""Adapters of other packages, against stand-ins that have their signatures and compute by our reference."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from attention.cases import Case, assert_close, attend
from moba_train.attention import adapters
from moba_train.attention.backends import BACKENDS
from moba_train.attention.reference import reference
from moba_train.attention.spec import AttentionSpec


def flash_moba_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, moba_chunk_size, moba_topk, causal=True
):
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    spec = AttentionSpec("moba", moba_chunk_size, moba_topk)
    return reference(q, k, v, cu_seqlens_q, max_seqlen_q, spec, q.shape[-1] ** -0.5)


def moba_attn_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk):
    assert q.shape == k.shape == v.shape
    assert (cu_seqlens.diff() > 0).all()
    spec = AttentionSpec("moba", moba_chunk_size, moba_topk)
    return reference(q, k, v, cu_seqlens, max_seqlen, spec, q.shape[-1] ** -0.5)


@pytest.fixture
def packages(monkeypatch):
    for name, function in (("flash_moba", flash_moba_varlen_func), ("moba.moba_efficient", moba_attn_varlen)):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "moba", ModuleType("moba"))
    monkeypatch.setattr(adapters, "find_spec", lambda name: object())


@pytest.mark.parametrize("name", ["flash_moba", "moonshot"])
def test_an_adapter_hands_everything_on(packages, name):
    case = Case("adapter", (150, 0, 70), heads=4, kv_heads=2, block_size=64, top_k=2)
    tensors = case.tensors()
    found = attend(BACKENDS[name].function, case, case.spec, tensors)
    assert_close(found, attend(reference, case, case.spec, tensors), 1e-6)
    with pytest.raises(ValueError, match=r"scale is 0.5; .* knows only head_dim"):
        query, key, value, _ = tensors
        BACKENDS[name].function(query, key, value, case.cu_seqlens(), 150, case.spec, 0.5)


def test_refusals(packages, monkeypatch):
    query, key, _, _ = Case("refusals", (8,)).tensors()
    on_gpu = torch.empty(8, 4, 32, dtype=torch.bfloat16, device="meta")
    spec = AttentionSpec("moba", 64, 3)
    assert "CUDA device" in adapters.flash_moba_refuses(query, key, spec)
    assert "not full" in adapters.moonshot_refuses(query, key, AttentionSpec("full"))
    monkeypatch.setattr(adapters, "_refuses", lambda *_: None)
    assert adapters.flash_moba_refuses(on_gpu, on_gpu, spec) is None
    assert adapters.moonshot_refuses(on_gpu, on_gpu, spec) is None
    assert "block_size 48" in adapters.flash_moba_refuses(on_gpu, on_gpu, AttentionSpec("moba", 48, 3))
    assert "top_k 65" in adapters.flash_moba_refuses(on_gpu, on_gpu, AttentionSpec("moba", 64, 65))
    assert "densely" in adapters.moonshot_refuses(on_gpu, on_gpu, AttentionSpec("moba", 64, 1))


@pytest.mark.parametrize("name", ["flash_moba", "moonshot"])
def test_a_package_that_is_missing_is_named(name):
    query, key, _, _ = Case("missing", (8,)).tensors()
    assert "is not installed" in BACKENDS[name].refuses(query, key, AttentionSpec("moba", 64, 3))
