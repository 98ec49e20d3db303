"""Write the captioned tree at the end of the README from the files themselves: python scripts/readme_tree.py

A Python file's caption is the first line of its docstring, a recipe's the first sentence of its first comment. The
test suite compares the README with what this prints.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- tree: written by scripts/readme_tree.py -->", "<!-- end of tree -->"
WIDTH = 34
CAPTIONED = ("moba_train", "configs", "scripts")
FOLDERS = {
    "data/books": "the embedded corpus: 16 books to train on, 2 held out, SOURCES.md",
    "data/tokenizer": "4,096 byte-level BPE entries, trained on the training books",
    "data/base_model": "3.1M parameters, context 512: what the default recipe starts from",
    "data/smollm2": "SmolLM2's tokenizer",
    "tests": "mirrors moba_train/, one file a module",
    "docs": "performance.md: every measurement; the picture above, and what lies behind the first table",
}


def caption(file: Path) -> str:
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        return text.splitlines()[0].rstrip(".") if text else ""
    lines = [s.lstrip("# ").rstrip() for s in file.read_text(encoding="utf-8").splitlines() if s.startswith("#")]
    text = " ".join(line for line in lines if not line.startswith("@package"))
    return re.split(r"(?<=[a-z\d%)])[.:](?:\s|$)", text)[0]


def tree() -> Iterator[str]:
    for top in CAPTIONED:
        yield f"{top}/"
        for file in sorted((ROOT / top).rglob("*")):
            depth = len(file.relative_to(ROOT).parts) - 1
            indent = "    " * depth
            if file.is_dir() and file.name != "__pycache__":
                yield f"{indent}{file.name}/"
            elif file.suffix in (".py", ".yaml") and not (file.name == "__init__.py" and not caption(file)):
                yield f"{indent + file.name:<{WIDTH}}{caption(file)}".rstrip()
    for folder, text in FOLDERS.items():
        yield f"{folder + '/':<{WIDTH}}{text}"


def section() -> str:
    return "\n".join([START, "", "```text", *tree(), "```", "", END])


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    main()
