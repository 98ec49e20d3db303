from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moba_train import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tree_equals_the_disk(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tree

    assert readme_tree.section() in README, f"run {Path(sys.executable).name} scripts/readme_tree.py"


def test_every_python_file_has_a_caption(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tree

    bare = [file for file in (ROOT / "moba_train").rglob("*.py") if not readme_tree.caption(file)]
    assert not bare


def test_no_caption_breaks_off(monkeypatch) -> None:
    """A docstring's first line is a paragraph of its own, and what a recipe's comment says ends in no bracket."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_tree

    files = [file for top in readme_tree.CAPTIONED for file in (ROOT / top).rglob("*")]
    python = [file for file in files if file.suffix == ".py"]
    first_lines = {file: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0] for file in python}
    assert [file for file, line in first_lines.items() if "\n" in line] == []
    captions = {file: readme_tree.caption(file) for file in files if file.suffix in (".py", ".yaml")}
    assert [text for text in captions.values() if text.count("(") != text.count(")")] == []


def test_make_targets_and_recipes_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`|or )make ([a-z-]+)", README, re.MULTILINE):  # not the word in a sentence
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for recipe in set(re.findall(r"experiment=([a-z0-9_]+)", README)) - {"mine"}:
        assert (ROOT / f"configs/experiment/{recipe}.yaml").is_file(), recipe


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_pictures_and_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        place, _, heading = link.partition("#")
        target = (ROOT / page).parent / place
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings]
        assert not heading or heading in anchors, (link, anchors)


def test_the_table_of_attention_is_what_was_measured() -> None:
    """Times, ratios, memory and limits, to the digits shown."""
    lines = re.findall(r"^\| \d [^|] (.*) \|$", README, re.MULTILINE)
    cases = json.loads((ROOT / "docs/attention_h200.json").read_text())["cases"]
    assert len(lines) == len(cases) == 5
    for line, case in zip(lines, cases, strict=True):
        cells = [cell.strip() for cell in line.split("|")]
        dense, ours = (case["columns"][name] for name in ("dense", "triton"))
        ratios = (dense["times"][0] / ours["times"][0], dense["times"][1] / ours["times"][1])
        measured = [*dense["times"], *ours["times"], *ratios, ours["memory"], *case["limits_ms"]]
        shown = [float(number) for cell in cells[3:] for number in re.findall(r"[\d.]+", cell)]
        assert cells[0].replace(",", "") == str(case["length"])
        assert shown == pytest.approx(measured, rel=0.01), case["name"]


def write_recipe_of_your_own(folder: Path) -> None:
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "label: mine" in block)
    (folder / "experiment").mkdir()
    (folder / "experiment/mine.yaml").write_text(block)


def test_the_batch_job_of_your_own_recipe_would_start(tmp_path: Path) -> None:
    """Its rows share out over the ranks that the page gives it."""
    write_recipe_of_your_own(tmp_path)
    (line,) = re.findall(r"^    moba-train (train experiment=mine launch=slurm .*?)  +#", README, re.MULTILINE)
    command = [sys.executable, "-m", "moba_train", *line.split(), f"--config-dir={tmp_path}", "launch.dry_run=true"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_its_training_commands_compose(tmp_path: Path, capsys) -> None:
    write_recipe_of_your_own(tmp_path)
    lines = re.findall(r"^    moba-train train (.*?)(?:  +#.*)?$", README, re.MULTILINE)
    single = [line for line in lines if "--multirun" not in line and "--cfg" not in line]
    assert len(single) > 6
    for line in single:
        assert cli.run(["train", *line.split(), f"--config-dir={tmp_path}", "--cfg", "job"]) == 0, line
        assert yaml.safe_load(capsys.readouterr().out)["schedule"]["stages"], line


def test_the_recipe_of_your_own_composes(tmp_path: Path) -> None:
    """With the model's own tokenizer: a default of the embedded model must not stay behind."""
    write_recipe_of_your_own(tmp_path)
    command = [
        sys.executable,
        "-m",
        "moba_train",
        "train",
        f"--config-dir={tmp_path}",
        "experiment=mine",
        "--cfg",
        "job",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    composed = yaml.safe_load(done.stdout)
    assert composed["model"] == {
        "name": "llama",
        "path": "/models/Llama-3.2-1B",
        "gguf_file": None,
        "architecture": {},
        "tokenizer": None,
    }
    assert [source["name"] for source in composed["data"]["train"]] == ["arxiv"]
    assert composed["data"]["heldout"] == []
