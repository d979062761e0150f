# SPDX-License-Identifier: Apache-2.0
"""Reading a source tree without importing it: files, imports, functions."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = {"disca_kernels": "disca_kernels", "disca": "python/disca"}


@dataclass(frozen=True)
class Import:
    """One imported module: who imports, what, where, and whether importing the file does it."""

    importer: str
    target: str
    line: int
    at_import_time: bool

    def __str__(self) -> str:
        when = "" if self.at_import_time else " (inside a function)"
        return f"{self.importer}:{self.line} imports {self.target}{when}"


def parse(path: Path) -> ast.Module:
    return _parse_text(path.read_text(encoding="utf-8"))


@cache
def _parse_text(text: str) -> ast.Module:
    return ast.parse(text)


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def modules(root: Path) -> dict[str, Path]:
    """Return the module name of every Python file of both packages."""
    found = {}
    for package, folder in PACKAGE_ROOTS.items():
        for path in python_files(root, folder):
            parts = path.relative_to(root / folder).with_suffix("").parts
            stem = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *stem))] = path
    return found


def imports(root: Path) -> list[Import]:
    """Return every import of both packages; ``from a import b`` is ``a.b`` if that is a module."""
    known = modules(root)
    return [
        Import(name, target, line, at_import_time)
        for name, path in known.items()
        for target, line, at_import_time in _imports_of(parse(path), name, path, known)
    ]


def _imports_of(
    tree: ast.Module, name: str, path: Path, known: dict[str, Path]
) -> Iterator[tuple[str, int, bool]]:
    for node, at_import_time in _walk(tree, at_import_time=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_import_time
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")
                keep = len(package) - node.level + (path.stem == "__init__")
                base = ".".join(package[:keep] + ([base] if base else []))
            for alias in node.names:
                member = f"{base}.{alias.name}"
                private = alias.name.startswith("_")
                yield member if member in known or private else base, node.lineno, at_import_time


def _walk(node: ast.AST, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for branch in child.body:
                yield from _walk(branch, at_import_time=False)
                yield branch, False
            for branch in child.orelse:
                yield from _walk(branch, at_import_time)
                yield branch, at_import_time
            continue
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, at_import_time
        yield from _walk(child, at_import_time and not is_function)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function is compiled by Triton rather than run by Python."""
    return any("jit" in ast.unparse(d) for d in function.decorator_list)


def length(function: ast.FunctionDef) -> int:
    """Return the number of lines of a function, without its docstring and decorators."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def arguments(function: ast.FunctionDef) -> int:
    """Return how many arguments a caller may pass, not counting self and cls."""
    spec = function.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + bool(spec.vararg) + bool(spec.kwarg)
