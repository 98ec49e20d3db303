"""Which parts of a model get fused kernels, and that it computes the same with them."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from moba_train import hf_attention
from moba_train.attention.spec import AttentionSpec
from moba_train.config import FusedKernels
from moba_train.layers import fused_kernels
from moba_train.layers.fused_kernels import fuse, takes_fused_kernels
from moba_train.layers.tiled_mlp import tile_mlps
from moba_train.recompute import checkpoint_activations
from tiny import TINY_LLAMA

KINDS = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}
CPU = torch.device("cpu")


class Stand:
    """Stands in for one of Liger's autograd functions: counts its calls and computes in plain torch."""

    def __init__(self, compute) -> None:
        self.calls, self._compute = 0, compute

    def apply(self, *inputs):
        self.calls += 1
        return self._compute(*inputs)


def rms_norm(hidden, weight, eps):
    return nn.functional.rms_norm(hidden, weight.shape, weight, eps)


@pytest.fixture
def liger(monkeypatch) -> dict[str, Stand]:
    stands = {
        "swiglu.LigerSiLUMulFunction": Stand(lambda gate, up: nn.functional.silu(gate) * up),
        "rms_norm.LigerRMSNormFunction": Stand(rms_norm),
        "rope.LigerRopeFunction": Stand(apply_rotary_pos_emb),
    }
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, stand in stands.items():
        module, function = name.split(".")
        made = types.ModuleType(f"liger_kernel.ops.{module}")
        setattr(made, function, stand)
        monkeypatch.setitem(sys.modules, made.__name__, made)
    return stands


def build(kind: str, device: torch.device = CPU):
    hf_attention.register()
    keywords = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"} | KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **keywords), attn_implementation=hf_attention.NAME
    )
    hf_attention.set_plan(model.train(), [AttentionSpec("moba", 8, 2)] * 3)
    return model.to(device)


def results(model, ids: torch.Tensor) -> list[torch.Tensor]:
    loss = model(ids, labels=ids, use_cache=False).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("tiled", [False, True], ids=["", "tiled and recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_computes_the_same(kind: str, tiled: bool, liger: dict[str, Stand]) -> None:
    model = build(kind)
    fused = copy.deepcopy(model)
    fuse(fused)
    if tiled:
        tile_mlps(fused, 10)
        checkpoint_activations(fused)
    ids = torch.randint(300, (2, 24))
    for got, want in zip(results(fused, ids), results(model, ids), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    again = 2 if tiled else 1
    norms = 7 + 6 * (kind == "qwen3")  # of queries and keys too
    assert liger["rms_norm.LigerRMSNormFunction"].calls == (norms - 1) * again + 1
    assert liger["rope.LigerRopeFunction"].calls == 3 * again
    assert liger["swiglu.LigerSiLUMulFunction"].calls == 3 * (1 if not tiled else 5 + 5)  # 48 tokens in tiles of 10
    calls = liger["rope.LigerRopeFunction"].calls
    results(model, ids)
    assert liger["rope.LigerRopeFunction"].calls == calls, "the library itself is left alone"


def test_other_activations_keep_their_own(liger: dict[str, Stand]) -> None:
    model = build("llama")
    for layer in model.base_model.layers:
        layer.mlp.act_fn = nn.GELU()
    fuse(model)
    results(model, torch.randint(300, (1, 24)))
    assert liger["swiglu.LigerSiLUMulFunction"].calls == 0


def test_who_takes_them(monkeypatch, caplog) -> None:
    cuda = torch.device("cuda")
    assert not takes_fused_kernels(FusedKernels.none, cuda)
    assert not takes_fused_kernels(FusedKernels.auto, CPU)
    with pytest.raises(ValueError, match=r"train\.fused_kernels=liger on cpu"):
        takes_fused_kernels(FusedKernels.liger, CPU)
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: None if name == "liger_kernel" else object())
    with caplog.at_level("INFO"):
        assert not takes_fused_kernels(FusedKernels.auto, cuda)
    assert "liger_kernel is not installed" in caplog.text
    with pytest.raises(ValueError, match="pip install liger-kernel"):
        takes_fused_kernels(FusedKernels.liger, cuda)
    monkeypatch.setattr(fused_kernels, "find_spec", lambda name: object())
    assert takes_fused_kernels(FusedKernels.auto, cuda) and takes_fused_kernels(FusedKernels.liger, cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_ligers_kernels_compute_the_same(kind: str) -> None:
    pytest.importorskip("liger_kernel")
    device = torch.device("cuda")
    model = build(kind, device)
    hf_attention.set_plan(model, [AttentionSpec("moba", 8, 2)] * 3, "reference")
    fused = copy.deepcopy(model)
    fuse(fused)
    tile_mlps(fused, 10)
    ids = torch.randint(300, (2, 24), device=device)
    for got, want in zip(results(fused, ids), results(model, ids), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
