"""Import order: what is imported comes first, in several languages; all else stays in its order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.config import FileOrder, SourceConfig, SourceFormat
from moba_train.data.documents import read_documents
from moba_train.data.imports import imports_first


def order(files: dict[str, str]) -> list[str]:
    """Paths in import order, of files given in the order of their paths."""
    ordered = imports_first(sorted(files.items()))
    assert dict(ordered) == files
    return [path for path, _ in ordered]


CASES = {
    "python": {
        "pkg/__init__.py": "from pkg.core import run\n",
        "pkg/core.py": "import os, json\nfrom . import util\nfrom .io.files import (\n    load,  # a comment\n)\n",
        "pkg/io/__init__.py": "",
        "pkg/io/files.py": "import pkg.util as u\n",
        "pkg/util.py": "import core_of_another\n",
        "setup.py": "import pkg\n",
    },
    "python in src": {
        "src/a.py": "from tools.text import clean\n",
        "src/tools/__init__.py": "",
        "src/tools/text.py": "from ..b import c\n",
        "src/b.py": "",
    },
    "c": {
        "app.c": '#include <stdio.h>\n#include "lib/a.h"\n',
        "include/lib/b.h": "",
        "lib/a.h": '# include "lib/b.h"\n',
    },
    "typescript": {
        "app.tsx": 'import { a } from "./lib/a.js"\nconst b = require("./lib")\nimport React from "react"\n',
        "lib/a.ts": "export * from '../util'\n",
        "lib/index.ts": 'import "./a"\n',
        "util.ts": "",
    },
    "java": {
        "src/main/java/org/x/App.java": "package org.x;\nimport org.x.util.Text;\nimport java.util.List;\n",
        "src/main/java/org/x/util/Text.java": "import static org.x.util.Zero.zero;\n",
        "src/main/java/org/x/util/Zero.java": "",
    },
    "go": {
        "cmd/main.go": 'import (\n\t"fmt"\n\tu "github.com/me/app/pkg/util"\n)\n',
        "pkg/util/util.go": 'package util\nimport "github.com/me/app/zero"\n',
        "zero/zero.go": "package zero\n",
    },
    "rust": {
        "src/geometry/mod.rs": "pub mod shape;\nuse crate::maths::Vector;\n",
        "src/geometry/shape.rs": "",
        "src/main.rs": "mod geometry;\nmod maths;\n",
        "src/maths.rs": "",
    },
}
EXPECTED = {
    "python": ["util", "io/files", "core", "__init__", "io/__init__", "setup"],
    "python in src": ["b", "text", "a", "__init__"],
    "c": ["b.h", "a.h", "app.c"],
    "typescript": ["util", "lib/a", "lib/index", "app"],
    "java": ["Zero", "Text", "App"],
    "go": ["zero", "util", "main"],
    "rust": ["shape", "maths", "mod", "main"],
}


@pytest.mark.parametrize("language", CASES)
def test_what_is_imported_comes_first(language: str) -> None:
    found = order(CASES[language])
    assert len(found) == len(EXPECTED[language])
    for path, expected in zip(found, EXPECTED[language], strict=True):
        assert expected in path, found


def test_cycles_are_broken_alike_each_time() -> None:
    files = {
        "a.py": "import b\n",
        "b.py": "import c\n",
        "c.py": "import a\n",
        "d.py": "import d\n",
        "e.py": "import a\n",
    }
    assert order(files) == ["c.py", "b.py", "a.py", "d.py", "e.py"]


def test_without_imports_the_order_stays() -> None:
    files = {
        "README.md": "import a\n",
        "a.py": "import json, re\n",
        "json.txt": "",
        "lib/json.py": "x = 1\n",
        "z.c": "",
    }
    assert order(files) == sorted(files)


def test_a_chain_longer_than_the_stack() -> None:
    files = {f"m{i:05}.py": f"import m{i + 1:05}\n" for i in range(5000)}
    assert order(files) == sorted(files, reverse=True)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))).map(lambda edges: (n, edges))
    )
)
def test_every_file_once_and_after_its_imports(case: tuple[int, list[tuple[int, int]]]) -> None:
    """Without cycles: edges go from a later file to an earlier one, or the other way round, but not both."""
    count, pairs = case
    names = [f"m{i:02}.py" for i in range(count)]
    needs = {name: sorted({names[min(pair)] for pair in pairs if names[max(pair)] == name} - {name}) for name in names}
    reverse = {name: sorted({other for other in names if name in needs[other]}) for name in names}
    for wanted in (needs, reverse):
        files = {name: "".join(f"import {other[:-3]}\n" for other in others) for name, others in wanted.items()}
        place = {path: i for i, path in enumerate(order(files))}
        assert sorted(place) == names
        assert all(place[other] < place[name] for name, others in wanted.items() for other in others)


@given(st.text(), st.sampled_from(["py", "c", "ts", "java", "go", "rs"]))
def test_any_text_at_all(text: str, suffix: str) -> None:
    order({f"a.{suffix}": text, f"b/c.{suffix}": text})


@pytest.mark.parametrize("grouped", [False, True], ids=["folder", "records"])
def test_a_repository_in_import_order(tmp_path: Path, grouped: bool) -> None:
    files = {"a.py": "import b\n", "b.py": "b = 1\n", "c.txt": "c\n"}
    if grouped:
        rows = [{"content": text, "repo": "r", "file": path} for path, text in files.items()]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceConfig(name="code", format=SourceFormat.jsonl, path=str(tmp_path), text_field="content")
        source.group_field, source.path_field = "repo", "file"
    else:
        (tmp_path / "r").mkdir()
        for path, text in files.items():
            (tmp_path / "r" / path).write_text(text)
        source = SourceConfig(name="code", format=SourceFormat.repository, path=str(tmp_path))
    in_order = {FileOrder.path: "abc", FileOrder.imports: "bac"}
    for source.file_order, letters in in_order.items():
        (document,) = read_documents(source)
        assert [line[4] for line in document["text"].splitlines() if line.startswith("==> ")] == list(letters)
