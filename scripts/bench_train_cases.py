"""What bench_train.py measures: models, context lengths, switches."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

from moba_train.attention import AttentionSpec

FULL = AttentionSpec("full")


def moba(block_size: int, top_k: int) -> AttentionSpec:
    return AttentionSpec("moba", block_size, top_k)


@dataclass(frozen=True)
class Case:
    """One engine: a model at one context length with its switches, and the attentions that take steps in it."""

    name: str
    model: str
    context: int
    attentions: tuple[AttentionSpec, ...]
    rows: int = 1  # of a step, over all GPUs
    gpus: int = 1
    steps: int = 3  # timed, after one that is not
    warm: int = 1
    switches: dict[str, Any] = field(default_factory=dict)  # of ``train``
    dense_layer: bool = False  # time one layer's dense attention in the place of dense steps
    gradients_only: bool = False
    profile: bool = False


CHECKPOINTED = {"activation_checkpointing": True}
KEPT = {**CHECKPOINTED, "keep_attention": True}
LONG = {**CHECKPOINTED, "mlp_tile_tokens": 32768}
WHOLE_8B = {  # an optimizer step of 8e9 parameters on one GPU and 128 GB of host memory, with one micro-batch a step
    **CHECKPOINTED,
    "zero_stage": 3,
    "gradient_dtype": "bf16",
    "mlp_tile_tokens": 8192,
    "offload": {"moments": True, "hidden_states": True},
}

CASES = [
    Case("tiny", "tiny", 1024, (FULL, moba(128, 3)), switches={**KEPT, "mlp_tile_tokens": 100}, profile=True),
    Case(
        "tiny_gradients",
        "tiny",
        1024,
        (moba(128, 3),),
        warm=0,
        steps=1,
        switches={**LONG, "offload": {"hidden_states": True}},
        gradients_only=True,
        dense_layer=True,
    ),
    Case(
        "tiny_shared",
        "tiny",
        1024,
        (moba(128, 3),),
        gpus=2,
        warm=0,
        steps=1,
        switches={**CHECKPOINTED, "sequence_parallel_size": 2},
    ),
    Case("32k", "llama3_1b", 32768, (FULL, moba(512, 3)), switches=KEPT, profile=True),
    Case("32k_recomputed", "llama3_1b", 32768, (FULL, moba(512, 3)), switches=CHECKPOINTED, profile=True),
    Case("128k", "llama3_1b", 131072, (moba(128, 8), moba(4096, 12), FULL), steps=1, switches=KEPT),
    Case("128k_recomputed", "llama3_1b", 131072, (moba(4096, 12),), steps=1, switches=CHECKPOINTED),
    Case(
        "512k",
        "llama3_1b",
        1 << 19,
        (moba(4096, 12),),
        steps=1,
        warm=0,  # kernels are compiled by the cases before
        switches={**LONG, "keep_attention": True},
        dense_layer=True,
    ),
    Case(
        "1m",
        "llama3_1b",
        1 << 20,
        (moba(4096, 12),),
        steps=1,
        warm=0,
        switches={**LONG, "offload": {"hidden_states": True}},
        dense_layer=True,
    ),
    Case("smollm2_32k", "smollm2_135m", 32768, (FULL, moba(512, 3)), rows=4, switches=KEPT, profile=True),
    Case(  # small layers keep the host busier than the GPU, unless a pass has many tokens
        "smollm2_32k_one_pass",
        "smollm2_135m",
        32768,
        (FULL, moba(512, 3)),
        rows=4,
        switches={**KEPT, "micro_batch_tokens": 131072},
        profile=True,
    ),
    Case("tiny_one_pass", "tiny", 1024, (FULL, moba(128, 3)), rows=4, switches={**KEPT, "micro_batch_tokens": 4096}),
    Case("16k", "llama3_1b", 16384, (moba(512, 3),)),
]
SWITCHES = {  # each alone, beside activation checkpointing
    "": {},
    "keep_attention": {"keep_attention": True},
    "mlp_tile_tokens=8192": {"mlp_tile_tokens": 8192},
    "offload.hidden_states": {"offload": {"hidden_states": True}},
    "offload.moments": {"offload": {"moments": True}},
    "offload.optimizer=cpu": {"offload": {"optimizer": "cpu"}},
    "gradient_dtype=bf16": {"gradient_dtype": "bf16"},
    "fused_kernels=none": {"fused_kernels": "none"},
    "zero_stage=3 offload.parameters=cpu": {"zero_stage": 3, "offload": {"parameters": "cpu"}},
}
CASES += [
    Case(f"switch {name}".strip(), "llama3_1b", 65536, (moba(512, 3),), switches={**CHECKPOINTED, **switches}, steps=1)
    for name, switches in SWITCHES.items()
]
CASES += [
    Case(  # no optimizer step
        "8b_gradients",
        "llama3_8b",
        1 << 18,
        (moba(512, 3),),
        steps=1,
        warm=0,
        switches={**LONG, "offload": {"hidden_states": True}},
        gradients_only=True,
    ),
    *(
        Case(f"8b {context >> 10}k", "llama3_8b", context, (moba(4096, 12),), steps=1, switches=WHOLE_8B)
        for context in (1 << 15, 1 << 16, 3 << 15, 1 << 17)
    ),
]
STATES = {  # each alone: where parameters, gradients and optimizer state are, and in which type
    "": {},
    "zero_stage=2": {"zero_stage": 2},
    "zero_stage=3": {"zero_stage": 3},
    "gradient_dtype=bf16": {"gradient_dtype": "bf16"},
    "reduction_dtype=bf16": {"reduction_dtype": "bf16"},
    "fused_kernels=none": {"fused_kernels": "none"},
    "offload.moments": {"offload": {"moments": True}},
    "offload.optimizer=cpu": {"zero_stage": 2, "offload": {"optimizer": "cpu"}},
    "offload.optimizer=nvme": {
        "zero_stage": 3,
        "offload": {"optimizer": "nvme", "nvme_path": tempfile.gettempdir()},
    },
}
CASES += [
    Case(f"states {name}".strip(), "llama3_1b", 32768, (moba(512, 3),), switches={**CHECKPOINTED, **switches}, steps=4)
    for name, switches in STATES.items()
]
SHARED = {  # over how many GPUs, how many rows, with which switches: a row shared, and a row each
    "": (1, 1, {}),
    "sequence_parallel_size=2": (2, 1, {"sequence_parallel_size": 2}),
    "two rows": (2, 2, {}),
    "two rows, zero_stage=3": (2, 2, {"zero_stage": 3}),
    "sequence_parallel_size=4": (4, 1, {"sequence_parallel_size": 4}),
    "four rows": (4, 4, {}),
}
CASES += [
    Case(
        f"gpus {name}".strip(),
        "llama3_1b",
        131072,
        (moba(512, 3), moba(4096, 12)),
        rows=rows,
        gpus=gpus,
        steps=2,
        switches={**CHECKPOINTED, **switches},
    )
    for name, (gpus, rows, switches) in SHARED.items()
]
