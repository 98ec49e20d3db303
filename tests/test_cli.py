"""Bad input at the command line: one line with what, which value and the fix; soon, and before anything is written."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moba_train import cli, resolved
from moba_train.parallel import launch
from moba_train.summary import print_summary

STAGES = "schedule.stages=[{name: short, tokens: 2048, context_length: 128}]"


@pytest.fixture
def settings(tiny_corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run that would start: the tiny corpus, a Llama of two layers, a new store and run directory."""
    architecture = "{model_type: llama, vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2}"
    return [
        "model=books_tiny",
        *("model.name=tiny", f"model.tokenizer={tiny_corpus}/tokenizer.json", f"model.architecture={architecture}"),
        *("model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=2"),
        f"data.train=[{{name: train, path: {tiny_corpus}/train}}]",
        f"data.heldout=[{{name: heldout, path: {tiny_corpus}/heldout}}]",
        *(f"data.store_dir={tmp_path}/store", f"run.dir={tmp_path}/runs", "run.name=first"),
        *(STAGES, "schedule.tokens=null", "train.tokens_per_step=512", "launch.device=cpu", "wandb.mode=disabled"),
    ]


@pytest.fixture
def refused(settings: list[str], tmp_path: Path, monkeypatch, capsys):
    """Runs a verb, expects it to be refused, and returns its one line."""
    started: list[object] = []
    monkeypatch.setattr(launch, "run", lambda *arguments: started.append(arguments) or 1)

    def run(*overrides: str, verb: str = "train", exit_code: int = 2) -> str:
        capsys.readouterr()
        code = cli.run([verb, *(settings if verb == "train" else []), *overrides])
        error = capsys.readouterr().err
        assert code == exit_code
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 700, error
        assert not started, "processes were started"
        assert not (tmp_path / "runs" / "first" / "resolved.yaml").exists()
        assert not torch.cuda.is_initialized()
        return error.removeprefix("error: ").rstrip()

    return run


def test_the_settings_of_these_tests_would_start(settings: list[str], monkeypatch, capsys, tmp_path: Path) -> None:
    started: list[Path] = []
    monkeypatch.setattr(launch, "run", lambda config, file, claim: started.append(file) or 7)
    assert cli.run(["train", *settings]) == 7
    assert started == [tmp_path / "runs" / "first" / "resolved.yaml"]
    assert resolved.load(started[0]).attention.block_size == 128
    error = capsys.readouterr().err
    assert "exit code 7" in error and error.count("\n") == 1


# (overrides, words the line must hold: key, value, fix)
UNCOMPOSED = {
    "typo in a key": (
        ["attention.blok_size=64"],
        ["attention.blok_size", "did you mean attention.block_size?", "--cfg job"],
    ),
    "unknown section": (["atention.block_size=64"], ["atention"]),
    "key added past the schema": (["+attention.zzz=1"], ["attention.zzz", "choose from kind, block_size, top_k"]),
    "section added past the schema": (["+foo.bar=1"], ["foo", "choose from run, model"]),
    "key of another section": (["train.block_size=1"], ["train.block_size", "did you mean attention.block_size?"]),
    "typo in a stage": (["schedule.stages=[{nam: x}]"], ["schedule.stages", "nam", "did you mean name?"]),
    "a group that a stage does not have": (
        ["schedule.stages[0].mix.full_rows=1"],
        ["schedule.stages.0.mix.full_rows", "recipe"],
    ),
    "typo in an option": (["--mutlirun"], ["--mutlirun", "did you mean --multirun?"]),
    "a key without a name": (["=3"], ["'=3' is not key=value"]),
    "spaces without quotes": (["run.dir=/a b=c"], ["run.dir=/a b=c cannot be read", "run.dir='a b'"]),
    "an open bracket": (["data.train=[{name: a"], ["data.train=[{name: a cannot be read", "brackets"]),
    "a float for a whole number": (["schedule.tokens=1e9"], ["schedule.tokens=1e9", "float", "1_000_000"]),
    "a value that an option has not": (["--cfg", "jobs"], ["--cfg", "jobs", "'job'"]),
    "wrong type": (["attention.block_size=abc"], ["attention.block_size", "abc", "Integer"]),
    "wrong type in a stage": (["schedule.stages=[{tokens: abc}]"], ["schedule.stages", "tokens", "abc"]),
    "wrong type in a list": (["wandb.tags=[{a: 1}]"], ["wandb.tags[0]", "dict"]),
    "wrong type in a list's list": (
        ["data.train=[{name: a, path: b}, {name: c, path: d, file_suffixes: [{a: 1}]}]"],
        ["data.train[1].file_suffixes[0]", "dict"],
    ),
    "a new key of a table": (["data.mix.weights={books: 1}"], ["data.mix.weights", "books", "+data.mix.weights=…"]),
    "a sweep without --multirun": (["attention.top_k=1,2"], ["attention.top_k=1,2", "add --multirun", "[a,b]"]),
    "unknown choice": (["attention.kind=mobba"], ["attention.kind", "mobba", "full, moba"]),
    "unknown experiment": (["experiment=hybrid"], ["experiment/hybrid", "hybrid_90_10", "full_only"]),
    "unknown model": (["model=llama_900b"], ["model/llama_900b", "books_base"]),
    "no key=value": (["block_size"], ["'block_size' is not key=value", "--cfg job"]),
    "no key=value before an option": (["block_size", "--multirun"], ["'block_size' is not key=value"]),
    "no key=value after an option": (["--multirun", "block_size"], ["'block_size' is not key=value"]),
    "no such folder of recipes": (["-cd", "/nope"], ["/nope"]),
    "unknown base config": (["--config-name", "trian"], ["trian"]),
}
UNUSABLE = {
    "block_size below 1": (["attention.block_size=0"], ["attention.block_size=0", "at least 1"]),
    "top_k below 1": (["attention.top_k=0"], ["attention.top_k=0", "at least 1"]),
    "block_size below 1 in a stage": (
        ["schedule.stages=[{name: a, tokens: 1024, context_length: 128, attention: {block_size: -1}}]"],
        ["schedule.stages[0].attention.block_size=-1", "at least 1"],
    ),
    "more full layers than layers": (["attention.full_layers=3"], ["full_layers=3", "2 layers", "at most 2"]),
    "key convolution of another width": (["attention.key_conv=4"], ["attention.key_conv=4", "3 or 5"]),
    "unknown backend": (["attention.backend=flash3"], ["attention.backend=flash3", "varlen"]),
    "no stages": (["schedule.stages=[]"], ["schedule.stages", "experiment="]),
    "a stage's setting by its place": (
        ["schedule.stages[0].context_length=100"],
        ["schedule.stages[0].context_length=100", "tokens_per_step=512"],
    ),
    "a context length below 2": (
        ["schedule.stages[0].context_length=-128"],
        ["schedule.stages[0].context_length=-128", "at least 2"],
    ),
    "stage without a size": (
        ["schedule.stages=[{name: a, context_length: 128}]"],
        ["schedule.stages[0]", "exactly one"],
    ),
    "step not a multiple of the context": (["train.tokens_per_step=500"], ["tokens_per_step", "500", "multiple"]),
    "ranks that do not share the rows": (["launch.processes=3"], ["launch.processes=3", "multiple of 384"]),
    "micro-batches that do not share the rows": (["train.micro_batch_tokens=384"], ["3 rows", "multiple of 384"]),
    "more ranks than GPUs": (
        ["launch.device=cuda", "launch.processes=4"],
        ["launch.processes=4", "GPUs", "launch.device=cpu"],
    ),
    "a folder that is missing": (["model.path=/nope/model"], ["model.path=/nope/model", "not a folder"]),
    "typo in the architecture": (["+model.architecture.hiden_size=64"], ["hiden_size", "did you mean hidden_size"]),
    "unknown architecture": (["model.architecture.model_type=lama"], ["model_type=lama", "llama"]),
    "heads that do not divide": (["model.architecture.num_attention_heads=5"], ["model.architecture", "32", "5"]),
    "another's architecture": (["model.architecture.model_type=gpt2"], ["intermediate_size", "gpt2"]),
    "missing tokenizer": (["model.tokenizer=/nope/tokenizer.json"], ["/nope/tokenizer.json"]),
    "tokenizer beyond the vocabulary": (["model.architecture.vocab_size=200"], ["298 ids", "vocab_size=200"]),
    "no corpus": (["data.train=[]"], ["data.train", "at least one source"]),
    "missing corpus": (["data.train=[{name: a, path: /nope/books}]"], ["'a'", "/nope/books", "does not exist"]),
    "two sources of one name": (
        ["data.train=[{name: a, path: /x}, {name: b, path: /x}, {name: a, path: /y}]"],
        ["data.train[2].name=a", "another name"],
    ),
    "a number that torch cannot hold": (
        ["attention.block_size=99999999999999999999"],
        ["attention.block_size=99999999999999999999", "below 9223372036854775808"],
    ),
    "a step longer than the run": (
        ["train.tokens_per_step=4096"],
        ["train.tokens_per_step=4096", "2048 tokens", "lower it"],
    ),
    "nothing held out": (["data.heldout=[]"], ["data.heldout", "heldout_fraction"]),
    "bad run name": (["run.name=../up"], ["run.name='../up'", "letters, digits"]),
    "run directory under a file": (["run.dir=/dev/null/x"], ["/dev/null/x", "is a file", "run.dir"]),
    "run name too long": ([f"run.name={'a' * 200}"], ["run.name", "120 characters"]),
    "nothing to resume": (["run.resume=must"], ["run.resume=must", "no checkpoint", "run.resume=auto"]),
    "learning rate of zero": (["schedule.learning_rate.peak=0"], ["schedule.learning_rate.peak=0", "above 0"]),
    "bf16 without sharded state": (["train.precision=bf16"], ["train.precision=bf16", "train.zero_stage=1"]),
}


@pytest.mark.parametrize(("overrides", "words"), UNCOMPOSED.values(), ids=UNCOMPOSED)
def test_settings_that_do_not_compose(refused, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    line = refused(*overrides)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("overrides", "words"), UNUSABLE.values(), ids=UNUSABLE)
def test_settings_that_cannot_be_used(refused, tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    line = refused(*overrides)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir()), "neither a store nor a run directory is begun"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_context_length_that_no_document_reaches(refused, settings: list[str], tmp_path: Path, split: str) -> None:
    short = tmp_path / "short"
    short.mkdir()
    (short / "a.txt").write_text("the white whale sailed under a white moon")
    line = refused(f"data.{split}=[{{name: s, path: {short}}}]")
    assert (
        "context_length=128" in line and "tokens" in line and ("training" if split == "train" else "held-out") in line
    )
    assert not (tmp_path / "runs").exists()


def test_empty_corpus(refused, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no .txt" in refused(f"data.train=[{{name: e, path: {empty}}}]")
    (empty / "a.txt").touch()
    line = refused(f"data.train=[{{name: e, path: {empty}}}]")
    assert "train split holds no document" in line and "'e'" in line
    assert not list((tmp_path / "store").rglob("train/manifest.json"))
    assert not (tmp_path / "runs").exists()


def test_a_run_that_stands(settings: list[str], refused, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "runs" / "second"
    again = ["run.name=second"]
    with monkeypatch.context() as first:
        first.setattr(launch, "run", lambda *arguments: 1)
        assert cli.run(["train", *settings, *again]) == 1
    assert "resume" not in capsys.readouterr().err  # no checkpoint to go on from
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = (folder / "resolved.yaml").read_bytes()
    assert "run.resume=never" in (line := refused(*again)) and "run.resume=auto" in line and str(folder) in line
    line = refused(*again, "run.resume=auto", "attention.top_k=2")
    assert "attention.top_k: 4 -> 2" in line and "another run.name" in line
    assert "no checkpoint" in refused(*again, "run.resume=must")
    (folder / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert "none of the 1 checkpoints" in refused(*again, "run.resume=auto")
    assert (folder / "resolved.yaml").read_bytes() == before


def test_paths_are_printed_as_they_are(settings: list[str], monkeypatch, capsys, tmp_path: Path) -> None:
    folder = tmp_path / f"a[bold]{'x' * 90}" / "first"
    monkeypatch.setattr(launch, "run", lambda *arguments: 1)
    assert cli.run(["train", *settings, f"run.dir='{folder.parent}'"]) == 1
    assert f"run directory: {folder}\n" in capsys.readouterr().out


def test_a_summary_prints_names_as_they_are(tmp_path: Path, capsys) -> None:
    folder = tmp_path / f"a[bold]{'x' * 90}"
    folder.mkdir()
    point = {"point": "[red]", "step": 4, "tokens": 2048, "loss": 1.0, "trailing_loss": 2.0}
    result = {"status": "completed", "points": [point], "tokens_per_second": None}
    (folder / "result.json").write_text(json.dumps(result))
    print_summary(folder, Console(width=80))
    out = capsys.readouterr().out
    assert f"{folder.name}: held-out loss" in out and "[red]" in out


@pytest.mark.parametrize(("values", "expected"), [("0,2", 2), ("2,3", 7)], ids=["a bad setting", "failed runs"])
def test_a_sweep_goes_on_past_a_point_that_fails(
    settings: list[str], monkeypatch, capsys, tmp_path: Path, values: str, expected: int
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(launch, "run", lambda config, file, claim: started.append(file) or 7)
    assert cli.run(["train", "--multirun", *settings, f"attention.top_k={values}"]) == expected
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2, lines
    (sweep,) = (tmp_path / "runs").iterdir()
    assert started and all(file.parent.parent == sweep for file in started)
    assert [resolved.load(file).attention.top_k for file in started] == ([2] if expected == 2 else [2, 3])


def test_other_verbs(refused) -> None:
    assert refused(verb="nope").startswith("unknown verb 'nope': choose from train, plan, prepare, ")
    assert refused(verb="report") == "run is not given: moba-train report run=DIRECTORY"
    assert "/nope" in refused("run=/nope", verb="report")
    assert "'run' is not key=value" in refused("run", verb="report")
    assert refused("tokens=[64", verb="bench") == "tokens=[64 cannot be read: close its brackets and quotes"
    assert refused("tokens=abc", verb="bench").startswith("tokens[0]: Value 'abc' of type 'str' could not be converted")
    assert refused("heads=[1,2]", verb="bench").startswith("heads: Value '[1, 2]' of type 'ListConfig' could not be")
    assert refused("device=gpu", verb="bench").startswith("device: Invalid value 'gpu', expected one of [auto, cpu,")
    assert refused("ru=x", verb="report") == "ru is unknown: choose from run, out"
    assert "model=llama" in refused("model=llama", verb="fetch")
    assert "attention.blok" in refused("attention.blok=1", verb="prepare")


def test_a_place_that_cannot_be_written(refused, tmp_path: Path, monkeypatch) -> None:
    from moba_train import report

    monkeypatch.setattr(report, "build", lambda run, out: out.mkdir(parents=True))
    assert refused("run=/nope", "out=/dev/null/x", verb="report") == "/dev/null/x: Not a directory"


def test_assertions_switched_off() -> None:
    """Hydra's parser needs them; and a docstring is a verb's help."""
    for level in ("-O", "-OO"):
        command = [sys.executable, level, "-m", "moba_train", "train", "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: Hydra does not run with python -O: unset PYTHONOPTIMIZE\n"


def test_a_folder_that_is_gone(refused, tmp_path: Path, monkeypatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "gone: cd to one" in refused()


def test_a_path_may_begin_at_home(refused, tmp_path: Path, monkeypatch) -> None:
    """Not every shell puts the folder in the place of run=~/…"""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"run={tmp_path}/runs is not a directory" in refused("run=~/runs", verb="report")


def test_a_closed_output_is_no_traceback(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it after >&-
    monkeypatch.setattr(sys, "argv", ["moba-train", "--version"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()


@pytest.mark.parametrize("clean_up", [lambda: None, lambda: None.fails], ids=["clean", "a library's clean-up fails"])
def test_ctrl_c_is_no_traceback(monkeypatch, capsys, clean_up) -> None:
    from moba_train.commands import report

    def interrupted(arguments: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            clean_up()

    monkeypatch.setattr(report, "main", interrupted)
    assert cli.run(["report", "run=/nope"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_and_version(capsys) -> None:
    for arguments in ([], ["--help"], ["train", "--help"], ["--version"], ["train", "--version"]):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "attention.blok_size=64"],
        ["train", "attention.top_k=0"],
        ["train", "model.path=/nope/model"],
        ["report", "run=/nope"],
    ],
    ids=" ".join,
)
def test_as_a_user_sees_it(arguments: list[str], tmp_path: Path) -> None:
    """The real command, from an empty folder: one line and no traceback, within seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", "from moba_train.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    # 3 seconds on an idle machine; shared caches make a busy one spend more.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 7
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("attention: {top_k: 7}", ["`# @package _global_` its first line"]),
        (
            "# @package _global_\nattention: {tpo_k: 7}",
            ["'experiment/mine'", "'tpo_k'", "did you mean attention.top_k?"],
        ),
        (
            "# @package _global_\ntrain: {tokens_per_step: 8k}",
            ["'experiment/mine'", "train.tokens_per_step", "8k", "1_000_000"],
        ),
        ("# @package _global_\nattention: 7", ["'experiment/mine'", "AttentionConfig", "7"]),
        ("# @package _global_\nattention: {top_k: 7", ["mine.yaml, line", "brackets"]),
        ("# @package _global_\nattention:\n\ttop_k: 7", ["mine.yaml, line 3", "'\\t'", "spaces"]),
    ],
    ids=["no package line", "typo", "no whole number", "no group", "an open bracket", "a tab"],
)
def test_recipes_that_cannot_be_read(refused, tmp_path: Path, recipe: str, words: list[str]) -> None:
    file = tmp_path / "recipes" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(recipe + "\n")
    line = refused("--config-dir", str(tmp_path / "recipes"), "experiment=mine")
    assert all(word in line for word in words), line


def test_hydras_own_options_still_work(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes" / "experiment"
    recipes.mkdir(parents=True)
    (recipes / "mine.yaml").write_text("# @package _global_\nattention: {top_k: 7}\n")
    command = [sys.executable, "-c", "from moba_train.cli import main; main()", "train", "--cfg", "job"]
    options = ["~model", "-cd", str(tmp_path / "recipes"), "experiment=mine"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "top_k: 7" in done.stdout and "  path: null" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["recipes"]
