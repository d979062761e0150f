# SPDX-License-Identifier: Apache-2.0
"""The rules of docs/conventions.md as functions from a tree to a list of complaints."""

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from tests.contract.source import (
    Import,
    arguments,
    functions,
    imports,
    is_kernel,
    length,
    python_files,
)

FILE_LINES, HOST_LINES, KERNEL_LINES, HOST_ARGUMENTS = 400, 60, 150, 12
NATIVE_FILE_LINES = 450
BUDGETED = ("disca_kernels", "python", "tests", "benchmarks")
SPDX = "SPDX-License-Identifier: Apache-2.0"
ROOMS = ("__init__", "api", "reference", "function", "triton", "cases")
BACKEND_ROOMS = re.compile(r"(triton|cpu|cuda)(_\w+)?$")
COMMON = ("_ext", "_version", "backend", "triton_common")


def op_names(root: Path) -> list[str]:
    folder = root / "disca_kernels" / "ops"
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__")


def wrong_arrows(root: Path) -> list[str]:
    """Return a complaint for each import against the arrows disca -> ops -> rooms -> common."""
    return [
        f"{found}: {reason}"
        for found in imports(root)
        for reason in [_against_the_arrows(found)]
        if reason is not None
    ]


def _against_the_arrows(found: Import) -> str | None:
    importer, target = found.importer.split("."), found.target.split(".")
    if importer[0] == "disca":
        return _from_the_model_layer(target)
    if target[0] == "disca":
        return "disca_kernels knows no model"
    if target[:2] == ["disca_kernels", "_C"]:
        return "the extension is loaded by disca_kernels._ext alone"
    if importer[1:2] == ["ops"] and len(importer) > 2:
        return _from_an_op(importer[2:], target, found.at_import_time)
    if found.at_import_time and target[0] == "triton" and importer[1:2] != ["triton_common"]:
        return "Triton is imported by the kernels' rooms alone, or inside a function"
    if importer[1:2] and importer[1] in COMMON and target[:2] == ["disca_kernels", "ops"]:
        return "what ops share cannot depend on an op"
    if target[:2] == ["disca_kernels", "ops"] and len(target) > 3 and found.at_import_time:
        return "the rooms of an op are private to it"
    return None


def _from_the_model_layer(target: list[str]) -> str | None:
    if target[0] == "triton":
        return "disca owns no kernel"
    if target[0] != "disca_kernels" or len(target) == 1:
        return None
    if target[1] == "triton_common" or (target[1].startswith("_") and target[1] != "__version__"):
        return "disca uses the public API"
    if target[1] == "ops" and len(target) > 3:
        return "disca uses an op, not its rooms"
    return None


def _from_an_op(importer: list[str], target: list[str], at_import_time: bool) -> str | None:
    op, room = importer[0], importer[1] if len(importer) > 1 else "__init__"
    if target[0] == "triton" and at_import_time and not BACKEND_ROOMS.match(room):
        return "Triton is imported by the kernels' rooms alone"
    if room == "reference" and target[0] not in {"torch", *sys.stdlib_module_names}:
        return "a reference is torch and nothing else"
    if target[:2] != ["disca_kernels", "ops"] or len(target) < 3:
        return None
    if target[2] != op:
        return "no op reaches into another op"
    target_room = target[3] if len(target) > 3 else "__init__"
    if room == "__init__" and target_room != "api":
        return "an op's package exports its api"
    if BACKEND_ROOMS.match(room) and target_room in ("__init__", "api", "function"):
        return "kernels know neither autograd nor the public function"
    if at_import_time and BACKEND_ROOMS.match(target_room) and not BACKEND_ROOMS.match(room):
        return "a backend is imported by the call that needs it"
    return None


def missing_rooms(root: Path) -> list[str]:
    """Return a complaint for each room or registration that an op lacks, and for each orphan."""
    names = op_names(root)
    complaints = [c for op in names for c in _rooms_of(root, op)]
    for folder in sorted(p for p in (root / "csrc").glob("*") if p.is_dir()):
        if folder.name != "common" and folder.name not in names:
            complaints.append(f"csrc/{folder.name} belongs to no op")
    for page in sorted((root / "docs" / "ops").glob("*.md")):
        # A long page continues in another: attention.md in attention_accuracy.md.
        if not any(page.stem == op or page.stem.startswith(f"{op}_") for op in names):
            complaints.append(f"docs/ops/{page.name} describes no op")
    return complaints


def _rooms_of(root: Path, op: str) -> list[str]:
    rooms = root / "disca_kernels" / "ops" / op
    expected = [rooms / f"{room}.py" for room in ROOMS]
    expected += [
        root / "tests" / "ops" / f"test_{op}.py",
        root / "benchmarks" / f"bench_{op}.py",
        root / "docs" / "ops" / f"{op}.md",
    ]
    has_cpu, has_cuda = (rooms / "cpu.py").exists(), (rooms / "cuda.py").exists()
    native = [f"{op}.h"] * (has_cpu or has_cuda)
    native += [f"{op}_cpu.cpp"] * has_cpu + [f"{op}_cuda.cu"] * has_cuda
    expected += [root / "csrc" / op / name for name in native]
    complaints = [
        f"{op}: {path.relative_to(root)} is missing" for path in expected if not path.exists()
    ]
    present = sorted(path.name for path in (root / "csrc" / op).glob("*"))
    homes = [f"{op}.h", f"{op}_bindings.cpp"] * (has_cpu or has_cuda)
    homes += [f"{op}_cpu*"] * has_cpu + [f"{op}_cuda*"] * has_cuda
    complaints += [
        f"{op}: csrc/{op}/{name} has no room in ops/{op}"
        for name in present
        if not any(fnmatch(name, home) for home in homes)
    ]
    sources = sorted(n for n in {*native, *present} if not n.endswith((".h", ".cuh")))
    return complaints + _registrations_of(root, op, sources)


def _registrations_of(root: Path, op: str, sources: list[str]) -> list[str]:
    def lacks(path: str, pattern: str) -> bool:
        return re.search(pattern, (root / path).read_text(encoding="utf-8")) is None

    wanted = [
        ("disca_kernels/__init__.py", rf"from disca_kernels\.ops\.{op} import \(?[^)]*\b{op}\b"),
        ("disca_kernels/__init__.py", rf'"{op}",'),
        ("disca_kernels/__init__.py", rf'"{op}_jvp",'),
        ("disca_kernels/backend.py", rf'"{op}": \('),
        ("CHANGELOG.md", rf"`{op}`"),
    ]
    wanted += [("CMakeLists.txt", rf"csrc/{op}/{re.escape(name)}") for name in sources]
    wanted += [("csrc/bindings.cpp", rf"register_{op}\(m\)")] * bool(sources)
    return [f"{op}: {path} lacks /{regex}/" for path, regex in wanted if lacks(path, regex)]


def over_budget(root: Path) -> list[str]:
    """Return a complaint for each file, function or signature that outgrew its budget."""
    complaints = []
    for path in python_files(root, *BUDGETED):
        name = path.relative_to(root)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES:
            complaints.append(f"{name}: {lines} lines, at most {FILE_LINES}")
        for function in functions(path):
            where = f"{name}:{function.lineno} {function.name}"
            budget = KERNEL_LINES if is_kernel(function) else HOST_LINES
            if length(function) > budget:
                complaints.append(f"{where}: {length(function)} lines, at most {budget}")
            if not is_kernel(function) and arguments(function) > HOST_ARGUMENTS:
                complaints.append(
                    f"{where}: {arguments(function)} arguments, at most {HOST_ARGUMENTS}"
                )
    for path in native_files(root):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > NATIVE_FILE_LINES:
            complaints.append(
                f"{path.relative_to(root)}: {lines} lines, at most {NATIVE_FILE_LINES}"
            )
    return complaints


def native_files(root: Path) -> list[Path]:
    return sorted(
        p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    )


def missing_package_markers(root: Path) -> list[str]:
    """Return a complaint for each folder of modules that a wheel would leave out."""
    folders = {path.parent for path in python_files(root, "disca_kernels", "python/disca")}
    return [
        f"{folder.relative_to(root)}: __init__.py is missing"
        for folder in sorted(folders)
        if not (folder / "__init__.py").exists()
    ]


def bad_headers(root: Path) -> list[str]:
    """Return a complaint for each source file without its licence line or with a torch header."""
    sources = [*python_files(root, *BUDGETED, "examples"), root / "setup.py", *native_files(root)]
    complaints = []
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if SPDX not in text.partition("\n")[0]:
            complaints.append(f"{path.relative_to(root)}: the first line is not the SPDX line")
    for path in native_files(root):
        if re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text(encoding="utf-8")):
            complaints.append(f"{path.relative_to(root)}: includes a torch header")
    return complaints
