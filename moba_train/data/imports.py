"""Import order: the files of a repository, each after those of them that it imports: definitions come before uses.

As in DeepSeek-Coder's repository-level data (arXiv:2401.14196, section 2.2). Imports are found by patterns rather than
by parsers: every file has some, whatever its version of the language, and the same ones under every Python. A pattern
that matches in a comment costs nothing but an order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<base>\.*[\w.]*)[ \t]+import[ \t]+(?P<names>\([^)]*\)|[^\n#;]+)"
    r"|import[ \t]+(?P<modules>[^\n#;]+))",
    re.MULTILINE,
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)
_SCRIPT = re.compile(r"""(?:\bfrom|\bimport|\brequire[ \t]*\(|\bimport[ \t]*\()[ \t]*["'](\.[^"'\n]*)["']""")
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+)", re.MULTILINE)
_GO = re.compile(r'^[ \t]*(?:import[ \t]+)?(?:[\w.]+[ \t]+)?"([\w./~-]+)"[ \t]*$', re.MULTILINE)
_RUST = re.compile(
    r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?(?:mod[ \t]+(?P<module>\w+)[ \t]*;|use[ \t]+(?P<path>[\w:]+))", re.MULTILINE
)

_C_SUFFIXES = (".h", ".hh", ".hpp", ".hxx", ".cuh", ".c", ".cc", ".cpp", ".cxx", ".cu", ".m", ".mm")
_SCRIPT_SUFFIXES = (".js", ".mjs", ".cjs", ".jsx", ".ts", ".mts", ".cts", ".tsx", ".vue", ".svelte")
_JAVA_SUFFIXES = (".java", ".kt", ".scala")


def imports_first(files: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """``files``: (path, text). Their order is kept where no import decides; of a cycle's files, the one that comes
    first in it keeps its place before those that need it."""
    tree = _Tree(path for path, _ in files)
    first = {path: number for number, (path, _) in reversed(list(enumerate(files)))}
    needs = [sorted({first[path] for path in tree.imported(*file)} - {number}) for number, file in enumerate(files)]
    order: list[int] = []
    entered = [False] * len(files)
    for root in range(len(files)):
        # Depth first, without recursion: an import chain may be longer than Python's stack.
        stack = [] if entered[root] else [(root, iter(needs[root]))]
        entered[root] = True
        while stack:
            number, rest = stack[-1]
            for needed in rest:
                if not entered[needed]:  # one that is entered and not placed is in a cycle with this file
                    entered[needed] = True
                    stack.append((needed, iter(needs[needed])))
                    break
            else:
                order.append(number)
                stack.pop()
    return [files[number] for number in order]


class _Tree:
    """The paths of a repository, looked up as import statements name them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = set(paths)
        self._ends: defaultdict[str, list[str]] = defaultdict(list)  # any trailing part of a path → paths
        self._folders: defaultdict[str, list[str]] = defaultdict(list)  # any trailing part of a folder → its files
        for path in sorted(self._paths):
            parts = PurePosixPath(path).parts
            for start in range(len(parts)):
                self._ends["/".join(parts[start:])].append(path)
                if start < len(parts) - 1:
                    self._folders["/".join(parts[start:-1])].append(path)

    def imported(self, path: str, text: str) -> Iterator[str]:
        """Paths of the repository's files that the file ``path`` names."""
        suffix = PurePosixPath(path).suffix
        if suffix in (".py", ".pyi"):
            yield from self._python(path, text)
        elif suffix in _C_SUFFIXES:
            for name in _INCLUDE.findall(text):
                yield from self._near(path, name) or self._by_end(path, name)
        elif suffix in _SCRIPT_SUFFIXES:
            for name in _SCRIPT.findall(text):
                yield from self._script(path, name)
        elif suffix in _JAVA_SUFFIXES:
            for name in _JAVA.findall(text):
                stems = [
                    name.replace(".", "/"),
                    name.rpartition(".")[0].replace(".", "/"),
                ]  # a class, or a member of one
                yield from self._by_end(path, *(stem + end for stem in stems if stem for end in _JAVA_SUFFIXES))
        elif suffix == ".go":
            for name in _GO.findall(text):
                yield from self._go(name)
        elif suffix == ".rs":
            yield from self._rust(path, text)

    def _near(self, path: str, *names: str) -> list[str]:
        """The first of ``names``, relative to the file's folder, that is there."""
        for name in names:
            there = _normal(PurePosixPath(path).parent, name)
            if there in self._paths:
                return [there]
        return []

    def _by_end(self, path: str, *names: str) -> list[str]:
        """The first of ``names`` that some paths end with: of those the one that shares most folders with ``path``."""
        for name in names:
            if found := self._ends.get(_normal(PurePosixPath(), name)):
                own = PurePosixPath(path).parts
                return [max(found, key=lambda other: (_shared(own, PurePosixPath(other).parts), -len(other)))]
        return []

    def _python(self, path: str, text: str) -> Iterator[str]:
        for match in _PYTHON.finditer(text):
            if match["modules"]:
                modules = [name.split(" as ")[0].strip() for name in match["modules"].split(",")]
                for module in modules:
                    yield from self._module(path, module)
                continue
            base = match["base"]
            names = [name.split(" as ")[0].strip() for name in match["names"].strip("()").split(",")]
            below = [found for name in names for found in self._module(path, _below(base, name), whole=True)]
            yield from below or self._module(path, base)

    def _module(self, path: str, module: str, whole: bool = False) -> list[str]:
        """The file of a Python module. Not ``whole``: where it is none, that of the longest package of its name."""
        name = module.lstrip(".")
        up = "../" * (len(module) - len(name) - 1)
        parts = [part for part in name.split(".") if part.isidentifier()]
        if not parts:  # from . import …
            return self._near(path, f"{up}__init__.py")
        for count in range(len(parts), len(parts) - 1 if whole else 0, -1):
            stem = "/".join(parts[:count])
            if module.startswith("."):
                found = self._near(path, *(up + stem + end for end in _MODULE_ENDS))
            elif count > 1:
                found = self._by_end(path, *(stem + end for end in _MODULE_ENDS))
            else:  # a module of that name in some other folder is not the one that is meant: json, utils
                found = self._near(path, f"{stem}.py") or self._by_end(path, f"{stem}/__init__.py")
            if found:
                return found
        return []

    def _script(self, path: str, name: str) -> list[str]:
        stem = re.sub(r"\.[cm]?js$", "", name)
        ends = ["", *_SCRIPT_SUFFIXES, *(f"/index{end}" for end in _SCRIPT_SUFFIXES)]
        return self._near(path, name, *(stem + end for end in ends))

    def _go(self, name: str) -> list[str]:
        """A package is a folder: the longest end of its name that is one here."""
        parts = name.split("/")
        shortest = 1 if "." in parts[0] else 2  # without a host it is of the standard library, unless it is found whole
        for start in range(len(parts) - shortest + 1):
            if found := self._folders.get("/".join(parts[start:])):
                return [path for path in found if path.endswith(".go") and not path.endswith("_test.go")]
        return []

    def _rust(self, path: str, text: str) -> Iterator[str]:
        own = PurePosixPath(path)
        inside = own.parent if own.name in ("mod.rs", "lib.rs", "main.rs") else own.with_suffix("")
        for match in _RUST.finditer(text):
            if name := match["module"]:
                names = [_normal(inside, end) for end in (f"{name}.rs", f"{name}/mod.rs")]
                yield from (there for there in names if there in self._paths)
                continue
            root, *parts = match["path"].split("::")
            stems = ["/".join(parts[:count]) for count in range(len(parts), 0, -1) if all(parts[:count])]
            if root in ("crate", "self", "super"):
                yield from self._by_end(path, *(stem + end for stem in stems for end in (".rs", "/mod.rs")))


_MODULE_ENDS = (".py", "/__init__.py", ".pyi")


def _below(base: str, name: str) -> str:
    return base + name if base.endswith(".") else f"{base}.{name}"


def _normal(folder: PurePosixPath, name: str) -> str:
    """``folder/name`` without . and .. parts."""
    parts: list[str] = []
    for part in (folder / name).parts:
        if part == "..":
            if not parts:
                return ""
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Leading parts that two paths have in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
