"""Checkpoints across sizes: other ranks, ZeRO stages and sequence-parallel sizes go on from the same state.

One start for each entry of ``STARTS``, in this order; a case goes on from one of an earlier start.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moba_train import resolved
from moba_train.config import Config, Precision
from moba_train.data.tokens import prepare_store
from moba_train.model import load_model
from tiny import run_ranks

pytestmark = pytest.mark.distributed


def case(
    source: str | None, ranks: int, zero_stage: int, size: int = 1, precision: str = "fp32", **switches: Any
) -> dict[str, Any]:
    sizes = (
        f"{ranks} ranks, ZeRO {zero_stage}" + f", in groups of {size}" * (size > 1) + ", bf16" * (precision != "fp32")
    )
    sizes += "".join(
        f", {'.'.join([key, *value] if isinstance(value, dict) else [key])}" for key, value in switches.items()
    )
    return {
        "name": f"{source} to {sizes}" if source else sizes,
        "source": source,
        "train": {"zero_stage": zero_stage, "sequence_parallel_size": size, **switches},
        "precision": precision,
    }


STARTS: list[tuple[int, list[dict[str, Any]]]] = [
    (1, [case(None, 1, 0)]),
    (
        2,
        [
            *(case(None, 2, stage) for stage in (1, 2, 3)),
            *(case(None, 2, stage, precision="bf16") for stage in (1, 3)),
            case("1 ranks, ZeRO 0", 2, 0),
            case("1 ranks, ZeRO 0", 2, 2),
            case("1 ranks, ZeRO 0", 2, 3, 2),
            case("2 ranks, ZeRO 1", 2, 2, offload={"moments": True}),
            case("2 ranks, ZeRO 3", 2, 1),
            # For each of these DeepSpeed has another optimizer, with files of the same layout.
            case("2 ranks, ZeRO 1, bf16", 2, 1, precision="bf16", offload={"optimizer": "cpu"}),
            case("2 ranks, ZeRO 1, bf16", 2, 1, precision="bf16", gradient_dtype="bf16"),
            case("2 ranks, ZeRO 1, bf16", 2, 1, precision="bf16", offload={"moments": True}),
            case(
                "2 ranks, ZeRO 3",
                2,
                3,
                activation_checkpointing=True,
                mlp_tile_tokens=64,
                loss_tile_tokens=50,
                offload={"moments": True},
            ),
        ],
    ),
    (
        4,
        [
            case("1 ranks, ZeRO 0", 4, 1),
            case("2 ranks, ZeRO 1", 4, 3, 2),
            case("2 ranks, ZeRO 2", 4, 2, 4),
            case("2 ranks, ZeRO 3", 4, 3),
            case("2 ranks, ZeRO 3", 4, 0, offload={"moments": True}),
            case("2 ranks, ZeRO 1, bf16", 4, 3, precision="bf16", offload={"moments": True}),
            case("2 ranks, ZeRO 3, bf16", 4, 2, precision="bf16"),
            case(None, 4, 1, 4),
        ],
    ),
    (
        1,
        [
            case("2 ranks, ZeRO 1", 1, 0),
            case("2 ranks, ZeRO 3", 1, 2),
            case("4 ranks, ZeRO 1, in groups of 4", 1, 0),
        ],
    ),
]
# From a model folder, whose files no rank of ZeRO 3 holds whole, at 2 ranks each.
LOADED = {
    "plain": case(None, 2, 1) | {"name": "loaded"},
    "in parts": case(None, 2, 3, mlp_tile_tokens=64, offload={"parameters": "cpu"}) | {"name": "loaded in parts"},
    "in parts, in bf16": case(None, 2, 3, precision="bf16") | {"name": "loaded in parts, in bf16"},
}
OTHER_SHAPE = case(None, 2, 3) | {"name": "loaded in parts, of another shape", "refused": True}
STARTS[1][1].extend([*LOADED.values(), OTHER_SHAPE])
RESUMED = [one for _, cases in STARTS for one in cases if one["source"]]


@pytest.fixture(scope="module")
def facts(tiny_config_module: Config, tmp_path_factory) -> Callable[[str], dict]:
    folder = tmp_path_factory.mktemp("resize")
    config = copy.deepcopy(tiny_config_module)
    config.model.architecture["tie_word_embeddings"] = True  # one parameter under two names
    config.checkpoint.export = False
    config.train.tokens_per_step = 1024  # four rows of the second stage, one for each of four ranks
    config.schedule.stages[0].tokens, config.schedule.stages[1].tokens = 3072, 1024  # 3 steps, the second saved, and 1
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    prepare_store(config.data, str(config.model.tokenizer), progress=False)
    script = Path(__file__).with_name("resize_facts.py")
    load_model(config.model, Precision.fp32).save_pretrained(folder / "model")
    for one in LOADED.values():
        one["path"] = str(folder / "model")
    OTHER_SHAPE["path"] = str(shutil.copytree(folder / "model", folder / "other"))
    described = json.loads((folder / "other/config.json").read_text())
    (folder / "other/config.json").write_text(json.dumps({**described, "intermediate_size": 64}))

    for ranks, cases in STARTS:
        run_ranks(script, [str(folder / resolved.FILE), json.dumps(cases), str(folder)], ranks)
    return lambda name: torch.load(folder / f"{name}.pt")


@pytest.mark.parametrize("one", RESUMED, ids=lambda one: one["name"])
def test_a_run_goes_on_with_other_sizes(facts: Callable[[str], dict], one: dict[str, Any]) -> None:
    before, after = facts(one["source"]), facts(one["name"])
    assert after["begun"].keys() == before["saved"].keys() and len(after["begun"]) == 3 * 29 + 2
    for name, value in before["saved"].items():
        if name != "weight_decay":  # ZeRO 3 has more groups than two
            assert torch.equal(after["begun"][name], value), name
    assert sorted(set(after["begun"]["weight_decay"].tolist())) == sorted(set(before["saved"]["weight_decay"].tolist()))
    assert after["tokens"] == {step: hash for step, hash in before["tokens"].items() if step >= 2}
    rounding = 1e-6 if one["precision"] == "fp32" else 1e-2  # ranks add up gradients in bf16
    for expected, got in zip(losses(before), losses(after), strict=True):
        assert got == pytest.approx(expected, rel=rounding)


def test_a_folder_of_another_shape_is_refused_in_parts_too(facts: Callable[[str], dict]) -> None:
    message = facts(OTHER_SHAPE["name"])
    assert re.search(r"_proj\.weight has shape \(\d+, \d+\), and by config\.json \(", message), message
    assert "64" in message and message.endswith("give the two of one model")


def test_a_folder_loaded_in_parts_is_the_same_model(facts: Callable[[str], dict]) -> None:
    plain, parts, rounded = (facts(one["name"]) for one in LOADED.values())
    assert plain["initial"].keys() == parts["initial"].keys() == rounded["initial"].keys()
    for name, value in plain["initial"].items():
        assert torch.equal(parts["initial"][name], value), name
        assert torch.equal(rounded["initial"][name], value.bfloat16()), name
    # As they come from load_model: numbers on a rank of two.
    assert parts["loaded"] == rounded["loaded"] < 0.6 * plain["loaded"]
    for expected, got in zip(losses(plain), losses(parts), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


def losses(facts: dict) -> list[dict[str, float]]:
    kept = re.compile(r"(train|eval)/(loss|trailing_loss|gradient_norm|position_loss/\d+)|step|tokens")
    return [{key: value for key, value in row.items() if kept.fullmatch(key)} for row in facts["rows"]]
