from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moba_train import hf_attention
from moba_train.attention import dense_cpu, varlen
from moba_train.attention.spec import AttentionSpec
from moba_train.offload import HiddenStateOffload, HostMemory
from moba_train.recompute import checkpoint_activations
from tiny import TINY_LLAMA

SPECS = {"moba": AttentionSpec("moba", block_size=16, top_k=2), "full": AttentionSpec("full")}


class Calls:
    """Counts a function's calls."""

    def __init__(self, function) -> None:
        self.count, self._function = 0, function

    def __call__(self, *arguments, **keywords):
        self.count += 1
        return self._function(*arguments, **keywords)


def gradients(model, ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize(
    ("keep_attention", "keep_choices"),
    [(False, True), (True, True), (False, False)],
    ids=["", "attention kept", "choices made again"],
)
@pytest.mark.parametrize("kind", SPECS)
def test_recomputation_changes_nothing_and_gates_once_a_layer(
    kind: str, keep_attention: bool, keep_choices: bool, monkeypatch
) -> None:
    hf_attention.register()
    keywords = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **keywords), attn_implementation=hf_attention.NAME
    )
    hf_attention.set_plan(model.train(), [SPECS[kind]] * 3)
    ids = torch.randint(300, (2, 64))
    loss, plain = gradients(model, ids)
    gate, attention = Calls(varlen.choose), Calls(dense_cpu.causal_forward)
    monkeypatch.setattr(varlen, "choose", gate)
    monkeypatch.setattr(dense_cpu, "causal_forward", attention)
    cpu = torch.device("cpu")
    memory = HostMemory(cpu, 1 << 10)
    checkpoint_activations(model, keep_attention, HiddenStateOffload(cpu, memory, smallest=0), keep_choices)
    again, recomputed = gradients(model, ids)
    assert gate.count == (0 if kind == "full" else 3 if keep_choices else 6)
    assert attention.count == (3 if keep_attention else 6)
    assert torch.equal(again, loss)
    for got, want in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(got, want)
    del again
    gc.collect()
    # What went to the host: the inputs of three layers, 2 x 64 x 32 fp32 numbers.
    assert len(memory._free) == 3 * 2 * 64 * 32 * 4 // memory.chunk_bytes
