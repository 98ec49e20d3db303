"""The training code at full size on fake tensors: real shapes and operators, no memory, and nothing is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from moba_train import hf_attention
from moba_train.attention import backends
from moba_train.attention.blocks import Blocks
from moba_train.layers.tiled_mlp import tile_mlps
from moba_train.loss import TokenLosses
from moba_train.model import described_configuration
from moba_train.plan.setup import Setup
from moba_train.recompute import checkpoint_activations


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if (name := function._schema.name) in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = arguments[-2:] if name == "aten::mm" else arguments[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


def pass_through(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, watch: AbstractContextManager[object] | None = None
) -> None:
    """A forward and a backward pass over one micro-batch, seen by ``watch``; parameters are made before."""
    op = pytest.importorskip("moba_train.attention.kernels.op", reason="triton is not installed")

    def cut(bounds: torch.Tensor, block_size: int, tokens: int) -> Blocks:  # the real one reads its bounds
        blocks = tokens // block_size + 1
        return Blocks(*(torch.empty(size, dtype=torch.int32) for size in (blocks + 1, blocks, tokens)))

    monkeypatch.setattr(op, "cut", cut)
    monkeypatch.setattr(hf_attention, "check_bounds", lambda bounds, tokens: 0)  # so does this
    monkeypatch.setitem(
        backends.BACKENDS, "triton", backends.Backend(backends._triton, lambda query, key, spec: None, ("moba",))
    )
    hf_attention.register()
    length, train = setup.stage.context_length, setup.train
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            described_configuration(setup.config.model), dtype=torch.bfloat16, attn_implementation="moba"
        ).train()
        if train.mlp_tile_tokens:
            tile_mlps(model, train.mlp_tile_tokens)
        if train.activation_checkpointing:
            checkpoint_activations(model, train.keep_attention)
        hf_attention.set_plan(model, setup.specs, "triton")
        losses = TokenLosses(model, train.loss_tile_tokens)
        bounds = torch.zeros(2, dtype=torch.int32)
        with watch or nullcontext():
            names = ("input_ids", "targets", "position_ids")
            inputs = {name: torch.zeros(setup.rows, length, dtype=torch.int64) for name in names}
            loss, _ = losses(**inputs, cu_seq_lens_q=bounds, max_length_q=length)
            loss.backward()
