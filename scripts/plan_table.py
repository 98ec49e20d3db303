"""The README's table of an 8B model at a million tokens, MoBA against full attention: python scripts/plan_table.py"""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from moba_train import embedded, resolved
from moba_train.commands.compose import register
from moba_train.model import planned_shape
from moba_train.plan.estimate import StageEstimate, estimate
from moba_train.plan.hardware import PlanConfig, hardware
from moba_train.plan.memory import GB

CONTEXT = 1 << 20
TOKENS = 100_000_000_000
# GPUs, of which this many share a row, and rows of a step: one or more for each group that shares.
CASES = [(8, 8, 4), (32, 8, 4), (128, 8, 16), (1024, 32, 32)]


def main() -> None:
    register()
    heads = ["GPUs", "share a row", "tokens a step", "GB a GPU", "s a step", "tokens/s", "days per 100B tokens"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    with initialize_config_dir(str(embedded.folder("configs")), version_base="1.3"):
        for gpus, sharing, rows in CASES:
            moba, full = (predicted(gpus, sharing, rows, kind) for kind in ("moba", "full"))
            cells = [
                f"{gpus:,}",
                f"{sharing}",
                f"{rows * CONTEXT:,}",
                pair(moba, full, lambda each: f"{each.memory.needed / GB:.0f}"),
                pair(moba, full, lambda each: f"{each.time.total:,.0f}"),
                pair(moba, full, lambda each: f"{each.tokens_per_second:,.0f}"),
                pair(moba, full, lambda each: f"{TOKENS / each.tokens_per_second / 86400:,.1f}"),
            ]
            print(f"| {' | '.join(cells)} |")


def predicted(gpus: int, sharing: int, rows: int, kind: str) -> StageEstimate:
    """A step at the full context."""
    stage = f"[{{name: all, share: 1.0, context_length: {CONTEXT}, attention: {{kind: {kind}}}}}]"
    overrides = [
        "experiment=llama3_8b_1m",
        f"schedule.stages={stage}",
        f"launch.nodes={gpus // 8}",
        f"train.sequence_parallel_size={sharing}",
        f"train.tokens_per_step={rows * CONTEXT}",
    ]
    config = resolved.to_config(compose("train", overrides))
    return estimate(config, planned_shape(config.model), hardware(PlanConfig())).stages[0]


def pair(moba: StageEstimate, full: StageEstimate, cell) -> str:
    one, other = cell(moba), cell(full)
    return one if one == other else f"{one}, {other}"


if __name__ == "__main__":
    main()
