"""The page of one run: its losses over tokens and by position, the held-out readings, the stages, the settings."""

from __future__ import annotations

from omegaconf import OmegaConf

from moba_train.redact import redact
from moba_train.report import figures
from moba_train.report.page import ABSENT, Picture, Section, Table, Tile, html, loss_text, rate_text, share_text
from moba_train.report.runs import Point, Run
from moba_train.report.theme import render
from moba_train.tracking import format_amount, format_duration


def single_page(run: Run) -> tuple[str, list[Picture]]:
    """The HTML of the page and its pictures."""
    source = f"{run.path.name}/metrics.jsonl"
    pictures, sections = [], []
    if run.train_rows:
        window = figures.smoothing_window(run)
        pictures.append(
            render(
                "loss",
                figures.draw_losses(run),
                3.9,
                "Loss and trailing loss over tokens, stage ends marked",
                "Next-token loss over tokens. Thin: each logged step; thick: its mean over "
                f"{window} logged step{'s' * (window > 1)}; circles: the held-out set; right: "
                f"the last {figures.ENLARGED_SHARE:.0%} of the tokens enlarged. Trailing loss is that of the last "
                f"{run.bin_size:,} positions of segments that fill the context. Dashed: a stage ends. From {source}.",
            )
        )
        sections.append(Section("Loss", [pictures[-1]]))
    if readings := [point for point in run.points if point.curve and point.name != "step"]:
        curves = [figures.Curve(_point_name(point), i, run, point) for i, point in enumerate(readings)]
        pictures.append(
            render(
                "position_loss",
                figures.draw_position_losses(curves),
                3.7,
                "Held-out loss by position in the document",
                f"Held-out loss by the position of the predicted token, in bins of {run.bin_size:,} tokens, at each "
                f"reading of the held-out set. A model that uses its whole context falls to the right. From {source}.",
            )
        )
        sections.append(Section("Loss by position", [pictures[-1]]))
    if run.points:
        sections.append(Section("Held-out set", [_points_table(run)]))
    if run.train_rows:
        pictures.append(
            render(
                "throughput",
                figures.draw_throughput(run),
                2.6,
                "Training throughput over tokens",
                f"Training throughput of all devices together; evaluation and checkpoints not counted. From {source}.",
            )
        )
        sections.append(Section("Throughput", [pictures[-1], _stages_table(run)]))
    lead = f"{run.setting('model.name', 'model')} on {run.setting('data.name', 'data')}, {_stage_story(run)}"
    settings = OmegaConf.to_yaml(OmegaConf.create(redact(run.config)))
    title = run.path.name if run.path.name.startswith(run.label) else f"{run.label}: {run.path.name}"
    return html(title, run.status, lead, _tiles(run), sections, settings), pictures


def _tiles(run: Run) -> list[Tile]:
    first = run.points[0] if len(run.points) > 1 else None
    seconds = run.result.get("seconds") if run.result else None
    return [
        Tile("Held-out loss", loss_text(run.loss), f"from {loss_text(first.loss)}" if first else "nats per token"),
        Tile("Trailing loss", loss_text(run.trailing_loss), f"from {loss_text(first.trailing_loss)}" if first else ""),
        Tile("Throughput", rate_text(run.tokens_per_second), "tokens/s"),
        Tile("Sparsity", share_text(run.sparsity), "sparsest stage"),
        Tile(
            "Trained on", format_amount(run.tokens), "tokens" + (f" in {format_duration(seconds)}" if seconds else "")
        ),
        Tile("Peak memory", f"{run.memory_gb:.1f} GB" if run.memory_gb is not None else ABSENT),
    ]


def _points_table(run: Run) -> Table:
    rows = [
        [_point_name(p), f"{p.step:,}", f"{p.tokens:,}", loss_text(p.loss), loss_text(p.trailing_loss)]
        for p in run.points
    ]
    return Table(["read", "#step", "#tokens", "#loss", "#trailing loss"], rows, "Losses in nats per token.")


def _stages_table(run: Run) -> Table:
    rows = [
        [
            span.name,
            _attention(run, span.name),
            f"{span.last_tokens - span.first_tokens:,}",
            share_text(span.sparsity),
            rate_text(span.tokens_per_second),
            share_text(span.model_flop_utilization),
        ]
        for span in run.stages
    ]
    note = "Means over the logged steps of a stage; utilization of the devices' peak by the model's own operations."
    return Table(["stage", "attention", "#tokens", "#sparsity", "#tokens/s", "#FLOP utilization"], rows, note)


def _stage_story(run: Run) -> str:
    stages = run.setting("schedule.stages", [])
    told = [
        f"{stage.get('name', 'stage')} ({stage.get('context_length', 0):,} tokens, "
        f"{_attention(run, stage.get('name', 'stage'))})"
        for stage in stages
    ]
    return "stages: " + " → ".join(told) + "." if told else "no stages recorded."


def _attention(run: Run, stage_name: str) -> str:
    """A stage's attention in words, from resolved.yaml: its own settings over the run's."""
    settings = dict(run.setting("attention", {}))
    for stage in run.setting("schedule.stages", []):
        if stage.get("name") == stage_name:
            settings.update({key: value for key, value in (stage.get("attention") or {}).items() if value is not None})
    if settings.get("kind") == "full":
        return "full attention"
    told = f"MoBA, {settings.get('top_k')} blocks of {settings.get('block_size')}"
    return told + (f", last {settings['full_layers']} layers full" if settings.get("full_layers") else "")


def _point_name(point: Point) -> str:
    if point.name == "start":
        return "before training"
    return f"step {point.step:,}" if point.name == "step" else f"after {point.name}"
