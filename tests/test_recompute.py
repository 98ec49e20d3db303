from __future__ import annotations

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from moba_train import hf_attention
from moba_train.attention.spec import AttentionSpec
from moba_train.offload import HiddenStateOffload, HostMemory
from moba_train.recompute import checkpoint_activations
from tiny import TINY_LLAMA

SPECS = {"moba": AttentionSpec("moba", block_size=16, top_k=2), "full": AttentionSpec("full")}


class Counted(TorchDispatchMode):
    """Counts the calls of gate and attention that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = self.attentions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.gates += "choose" in str(function)
        self.attentions += str(function) in ("moba_train.varlen_moba.default", "moba_train.varlen_full.default")
        return function(*args, **(kwargs or {}))


def gradients(model, ids):
    with Counted() as counted:
        loss = model(ids, labels=ids, use_cache=False).loss
        found = torch.autograd.grad(loss, list(model.parameters()))
    return loss, found, counted


@pytest.mark.parametrize("keep_attention", [False, True], ids=["", "attention kept"])
@pytest.mark.parametrize("kind", SPECS)
def test_recomputation_changes_nothing_and_gates_once_a_layer(kind: str, keep_attention: bool) -> None:
    hf_attention.register()
    keywords = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **keywords), attn_implementation=hf_attention.NAME
    )
    hf_attention.set_plan(model.train(), [SPECS[kind]] * 3)
    ids = torch.randint(300, (2, 64))
    loss, plain, _ = gradients(model, ids)
    cpu = torch.device("cpu")
    memory = HostMemory(cpu, 1 << 10)
    checkpoint_activations(model, keep_attention, HiddenStateOffload(cpu, memory, smallest=0))
    again, recomputed, counted = gradients(model, ids)
    assert counted.gates == (3 if kind == "moba" else 0)
    assert counted.attentions == (3 if keep_attention else 6)
    assert torch.equal(again, loss)
    for got, want in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(got, want)
    del again
    gc.collect()
    # What went to the host: the inputs of three layers, 2 x 64 x 32 fp32 numbers.
    assert len(memory._free) == 3 * 2 * 64 * 32 * 4 // memory.chunk_bytes
