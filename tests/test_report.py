"""Report pages of made-up but realistic run directories."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from moba_train.report import build
from moba_train.report.heat_map import heat_map_cells, line_numbers
from moba_train.report.runs import read_runs

CONTEXT, BIN, STEP_TOKENS = 2048, 256, 16384


def write_run(path: Path, stages=(("moba", 0.9), ("full", 0.1)), steps=120, **options) -> Path:
    """A run as training leaves it: losses that fall, a base that fails beyond 512 tokens, one line a row.

    Options: label, block_size, top_k, finished, curve_every, name of the model.
    """
    block_size, top_k = options.get("block_size", 128), options.get("top_k", 3)
    sparsity = max(0.0, 1 - block_size * top_k / CONTEXT)
    noise = random.Random(f"{path.name}")
    path.mkdir(parents=True)
    config = {
        "run": {"label": options.get("label", "hybrid_90_10"), "name": path.name},
        "model": {"name": options.get("model", "gutenberg_4m"), "architecture": {"hidden_size": 256}},
        "attention": {"kind": "moba", "block_size": block_size, "top_k": top_k, "full_layers": 0},
        "data": {"name": "gutenberg"},
        "schedule": {
            "tokens": steps * STEP_TOKENS,
            "stages": [
                {"name": name, "share": share, "context_length": CONTEXT, "attention": {"kind": name}}
                for name, share in stages
            ],
        },
        "position_loss": {"bin_size": BIN},
        "wandb": {"api_key": "SECRET-VALUE"},
    }
    (path / "resolved.yaml").write_text(yaml.safe_dump(config))

    def losses(progress: float, stage: str) -> list[float]:
        """By bin: in-context learning, plus the base's failure beyond 512, which training heals."""
        gap = sparsity * 0.05 * (stage == "moba")
        return [
            3.35 + 0.35 / (1 + i) - 0.25 * progress + (2.2 * math.exp(-9 * progress) + gap) * min(1, max(0, i - 1) / 2)
            for i in range(CONTEXT // BIN)
        ]

    def columns(prefix: str, by_bin: list[float], jitter: float) -> dict:
        values = [value + noise.gauss(0, jitter) for value in by_bin]
        row = {f"{prefix}/loss": sum(values) / len(values), f"{prefix}/trailing_loss": values[-1]}
        return row | {f"{prefix}/position_loss/{i * BIN:06d}": value for i, value in enumerate(values)}

    rows = [{"step": 0, "tokens": 0, "eval/point": "start", **columns("eval", losses(0, "full"), 0.0)}]
    ends, total = [], 0.0
    for name, share in stages:
        total += share
        ends.append((round(total * steps), name))
    last = steps if options.get("finished", True) else steps // 3
    for step in range(1, last + 1):
        stage = next(name for end, name in ends if step <= end)
        row = {"step": step, "tokens": step * STEP_TOKENS, "stage": stage}
        row |= columns("train", losses(step / steps, stage), 0.05)
        rate = (9000 * (1 + 0.5 * sparsity) if stage == "moba" else 9000) * (1 + noise.gauss(0, 0.015))
        row |= {"perf/tokens_per_second": rate, "perf/memory_gb": 1.4, "train/learning_rate": 1e-3}
        row["perf/model_flop_utilization"] = 0.31 + noise.gauss(0, 0.01)
        row["perf/sparsity"] = sparsity if stage == "moba" else 0.0
        rows.append(row)
        if (step, stage) in ends:
            row = {"step": step, "tokens": step * STEP_TOKENS, "eval/point": stage}
            rows.append(row | columns("eval", losses(step / steps, stage), 0.004))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if options.get("finished", True):
        final = rows[-1]
        result = {
            "status": "completed",
            "loss": final["eval/loss"],
            "trailing_loss": final["eval/trailing_loss"],
            "tokens": steps * STEP_TOKENS,
            "seconds": 171.0,
            "tokens_per_second": 9000 * (1 + 0.4 * sparsity),
            "points": [],
        }
        (path / "result.json").write_text(json.dumps(result))
    return path


def write_sweep(path: Path, steps=60) -> Path:
    """A multirun over block_size x top_k whose last run was interrupted."""
    settings = [(block_size, top_k) for block_size in (64, 128, 256) for top_k in (2, 4)]
    for i, (block_size, top_k) in enumerate(settings):
        write_run(
            path / f"{i}_attention.block_size={block_size},attention.top_k={top_k}",
            steps=steps,
            block_size=block_size,
            top_k=top_k,
            finished=i < len(settings) - 1,
        )
    (path / "multirun.yaml").write_text("hydra: {}\n")
    return path


class Page(HTMLParser):
    """Text and images of a page, and every reference that leaves it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.images, self.outside, self.tags, self.cells = "", [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.cells += [dict(attributes).get("class", "")] if tag == "td" else []
        for name, value in attributes:
            if name in ("src", "srcset"):
                self.images.append(value)
            if name in ("src", "srcset", "href") and not value.startswith("data:"):
                self.outside.append(value)

    def handle_data(self, data):
        self.text += data


def test_single_run(tmp_path):
    run = write_run(tmp_path / "hybrid_90_10-1", steps=40)
    path = build(run)
    assert path == run / "report" / "index.html"
    names = {f"{stem}{theme}.png" for stem in ("loss", "position_loss", "throughput") for theme in ("", "-dark")}
    assert {p.name for p in path.parent.iterdir()} == names | {"index.html"}
    assert all((path.parent / name).read_bytes().startswith(b"\x89PNG") for name in names)
    page = Page(path)
    assert len(page.images) == 6 and page.outside == [] and "script" not in page.tags
    result = json.loads((run / "result.json").read_text())
    for shown in (
        f"{result['loss']:.4f}",
        f"{result['trailing_loss']:.4f}",
        "before training",
        "after moba",
        "after full",
        "MoBA, 3 blocks of 128",
        "81.25%",
        "2m 51s",
        "hybrid_90_10-1/metrics.jsonl",
        "completed",
    ):
        assert shown in page.text
    assert "SECRET-VALUE" not in path.read_text()


def test_numbers_are_read_exactly(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "r", steps=20)])
    assert [(p.name, p.step, p.tokens) for p in run.points] == [
        ("start", 0, 0),
        ("moba", 18, 18 * STEP_TOKENS),
        ("full", 20, 20 * STEP_TOKENS),
    ]
    assert list(run.points[0].curve) == list(range(0, CONTEXT, BIN))
    assert run.trailing_loss == run.points[-1].trailing_loss == run.points[-1].curve[CONTEXT - BIN]
    moba, full = run.stages
    assert (moba.first_tokens, moba.last_tokens, full.last_tokens) == (0, 18 * STEP_TOKENS, 20 * STEP_TOKENS)
    assert moba.sparsity == pytest.approx(0.8125) and full.sparsity == 0.0
    assert run.tokens == 20 * STEP_TOKENS and run.finished


def test_multirun_is_compared(tmp_path):
    path = build(write_sweep(tmp_path / "sweep", steps=30), tmp_path / "out")
    names = {p.name for p in path.parent.iterdir()}
    assert path == tmp_path / "out" / "index.html"
    assert {"heat_map.png", "heat_map-dark.png", "trailing_loss.png", "position_loss.png"} <= names
    page = Page(path)
    assert "6 runs of hybrid_90_10, 1 of them unfinished." in page.text
    assert "block_size=64, top_k=2" in page.text and "unfinished" in page.text
    assert sum("best" in kinds for kinds in page.cells) == 3  # loss, trailing loss, tokens/s


def test_heat_map_needs_both_varied(tmp_path):
    for i, top_k in enumerate((2, 4)):
        write_run(tmp_path / "a" / f"{i}_attention.top_k={top_k}", steps=10, top_k=top_k)
    assert heat_map_cells(read_runs([tmp_path / "a"])) == {}
    write_run(tmp_path / "c" / "0_x=1", steps=3, finished=False)
    write_run(tmp_path / "c" / "1_x=2", steps=3, finished=False, block_size=64, top_k=2)
    assert heat_map_cells(read_runs([tmp_path / "c"])) == {}
    runs = read_runs([write_sweep(tmp_path / "b", steps=10)])
    assert set(heat_map_cells(runs)) == {(b, k) for b in (64, 128, 256) for k in (2, 4)}
    assert line_numbers(runs) == [0, 7, 1, 8, 2, 9]  # seven colours: by block_size; dashes: by top_k
    assert line_numbers(read_runs([tmp_path / "a"])) == [0, 1]


def test_runs_stand_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 2, 1):
        write_run(tmp_path / f"{i}_run.seed={i}", steps=2)
    assert [run.overrides for run in read_runs([tmp_path])] == ["run.seed=1", "run.seed=2", "run.seed=10"]


def test_recipes_side_by_side_without_a_heat_map(tmp_path):
    for i, (name, stages) in enumerate({"full": [("full", 1.0)], "moba": [("moba", 1.0)]}.items()):
        write_run(tmp_path / f"{i}_experiment={name}", stages=stages, steps=10, label=name)
    page = Page(build([tmp_path / "0_experiment=full", tmp_path / "1_experiment=moba"], tmp_path / "out"))
    assert "2 runs of full and moba." in page.text and "experiment=moba" in page.text
    assert not (tmp_path / "out" / "heat_map.png").exists()


def test_unfinished_run(tmp_path):
    run = write_run(tmp_path / "cut", steps=30, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "tok')  # being written
    page = Page(build(run))
    assert "unfinished" in page.text and "before training" in page.text and "after moba" not in page.text


def test_what_the_run_says_is_escaped(tmp_path):
    run = write_run(tmp_path / "x", steps=4, label="<script>alert(1)</script>", model='"><img src=x>')
    page = Page(build(run))
    assert "script" not in page.tags and page.outside == []
    assert "<script>alert(1)</script>" in page.text


def test_losses_that_are_not_finite_leave_gaps(tmp_path):
    run = write_run(tmp_path / "nan", steps=6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in lines[2:4]:
        row["train/loss"] = row["train/trailing_loss"] = None
    lines[0]["eval/loss"] = lines[0]["eval/position_loss/000000"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert "from \N{EN DASH}" in Page(build(run)).text


@pytest.mark.parametrize("keep", ["eval/", "train/"], ids=["evaluation-only", "training-only"])
def test_reports_what_there_is(tmp_path, keep):
    run = write_run(tmp_path / "r", steps=3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in lines if any(key.startswith(keep) for key in row)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert build(run).is_file()


def test_rebuilt_in_place(tmp_path):
    run = write_run(tmp_path / "r", steps=3)
    assert build(run).read_bytes() == build(run).read_bytes()
    assert not list(run.glob("report/*.part"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("resolved.yaml", "run: [", r"resolved\.yaml cannot be read \(while parsing.*\): restore it"),
        ("result.json", "{", r"result\.json is damaged: remove it"),
        ("result.json", "{}", r"result\.json is damaged: remove it"),
        ("result.json", '{"points": []}', r"result\.json is damaged: remove it"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    run = write_run(tmp_path / "r", steps=3)
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        build(run)


def test_rows_that_are_no_steps_are_left_out(tmp_path):
    run = write_run(tmp_path / "r", steps=3)
    before = build(run).read_bytes()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4}\nnothing\n[]\n')
    assert build(run).read_bytes() == before


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"run=.*absent is not a directory"):
        build(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no run"):
        build(tmp_path)
    empty = write_run(tmp_path / "empty", steps=2)
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no row"):
        build(empty)
    with pytest.raises(ValueError, match="2 paths and no place"):
        build([empty, empty])
    assert not (empty / "report").exists()
