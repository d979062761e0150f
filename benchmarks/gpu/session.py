# SPDX-License-Identifier: Apache-2.0
"""One run: its steps in the order of their value, and the record that every step extends."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.batch import TIERS, Batch, RivalFile
from benchmarks.gpu.pytest_events import VARIABLE
from benchmarks.gpu.supervise import Supervisor, Workplace
from benchmarks.gpu.table import table

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
_BUILD_INPUTS = (
    "setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "csrc",
    "disca_kernels", "python",
)  # fmt: skip
_BUILD_LIMIT, _TESTS_LIMIT = 200.0, 60.0
_TUNING_LIMIT = 240.0
_DRY_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DISCA_CUDA": "0"}
_ORDER = (
    ("first", "installed"), ("", "tests"), ("second", "installed"), ("first", "rivals"),
    ("third", "installed"), ("second", "rivals"), ("third", "rivals"), ("second", "compiled"),
    ("fourth", "installed"), ("fourth", "rivals"),
)  # fmt: skip
_SHORT_ORDER = (("", "installed"), ("", "rivals"), ("", "tests"))
"""(tier, what), by value: what is cut off by the budget is missed the least."""
_NO_GPU_NEEDED = ("_codegen", "_cpu", "_contract", "_hopper")
"""How the names of tests end that compile, emulate or refuse on the host."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Attributes:
        out: folder of the results.
        mode: "gpu" for everything, "quick" or "dry".
        budget: seconds for everything.
        limit: seconds for one measurement.
        rivals: kernel files.
        skip: steps that are left out.
        commit: of the sources, where git cannot tell.
    """

    out: Path
    mode: str
    budget: float
    limit: float
    rivals: tuple[RivalFile, ...]
    skip: frozenset[str]
    commit: str | None

    @property
    def dry(self) -> bool:
        """Whether this is only a rehearsal, on the CPU."""
        return self.mode == "dry"


class Session:
    """Runs the steps and writes the record after each."""

    def __init__(self, settings: Settings, scratch: Path) -> None:
        self.settings = settings
        self._deadline = time.time() + settings.budget
        self._started = time.time()
        self._file = settings.out / f"{settings.mode}.json"
        site = scratch / "site"
        self._place = Workplace(
            root=ROOT,
            scratch=scratch,
            path=[site, ROOT, ROOT / "python"],
            environment=dict(_DRY_ENVIRONMENT) if settings.dry else {},
            log=settings.out / f"{settings.mode}.log",
        )
        self._place.log.unlink(missing_ok=True)
        self._site, self._choices = site, scratch / "choices.json"
        self._supervisor = Supervisor(self._place, self._deadline)
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "dry" if settings.dry else "gpu",
            "mode": settings.mode,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **commit(ROOT, settings.commit),
            "budget_seconds": settings.budget,
            "seed": int(time.time()),
            "machine": {},
            "versions": {},
            "ceilings": {},
            "steps": [],
            "tests": [],
            "measurements": [],
        }

    def run(self) -> None:
        """Run every step that is not skipped, most valuable first."""
        self._step("build", self._build)
        self._step("machine", partial(self._single, "machine"))
        if not self.settings.dry and "gpu" not in self.record["machine"]:
            self.record["steps"].append(
                {"name": "gpu", "status": "failed", "reason": "torch sees no CUDA device here"}
            )
            self._save()
            return
        self._step("ceilings", partial(self._single, "ceilings"))
        for tier, who in _ORDER if self.settings.mode == "gpu" else _SHORT_ORDER:
            if who == "tests":
                for name, arguments in self._tests():
                    self._step(f"tests {name}", partial(self._pytest, name, arguments))
                continue
            for op, tiers in TIERS.items():
                if who == "rivals" and (op != "attention" or not self.settings.rivals):
                    continue
                if tier in tiers or not tier:
                    self._measure(op, tier or self.settings.mode, who)

    def _measure(self, op: str, tier: str, who: str) -> None:
        name = {"rivals": "rivals", "compiled": f"compiled {op}"}.get(who, op)
        self._step(f"{name} {tier}", partial(self._batch, op, tier, who))

    def _step(self, name: str, work: Callable[[], str | None]) -> None:
        """Run one step and record how it went; nothing that happens in it stops the others."""
        started = time.time()
        if name.split()[0] in self.settings.skip:
            status, reason = "skipped", "left out on request"
        elif started > self._deadline:
            status = "skipped"
            reason = f"the budget of {self.settings.budget:.0f} s was used up before it"
        else:
            print(f"[{started - self._started:5.0f} s] {name}", flush=True)
            try:
                reason = work() or ""
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            status = "failed" if reason else "ok"
            cut_off = name.startswith("tests") and reason.startswith("stopped")
            if cut_off or "time budget was used up" in reason:
                status = "unfinished"
        seconds = round(time.time() - started, 1)
        self.record["steps"].append(
            {"name": name, "status": status, "reason": reason, "seconds": seconds}
        )
        self._save()

    def _build(self) -> str | None:
        """Build and install into a folder of our own, with what is installed."""
        sources = self._place.scratch / "sources"
        sources.mkdir()
        for name in _BUILD_INPUTS:
            source, target = ROOT / name, sources / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        command += ["--no-index", "--quiet", "--target", str(self._site), str(sources)]
        return self._place.run(command, self._limit(_BUILD_LIMIT))

    def _single(self, what: str) -> str | None:
        """Run a batch that is one measurement of the machine itself."""

        def keep(result: dict[str, Any]) -> None:
            problems.append(result.pop("reason", ""))
            status, _ = result.pop("status"), result.pop("op")
            if status != "ok":
                return
            if what == "machine":
                self._rename(result.pop("device_name"))
                self.record.update(result)
            else:
                self.record[what] = result

        problems: list[str] = []
        batch = self._new_batch(what, "", "")
        return self._supervisor.run(batch, self.settings.limit, keep) or "".join(problems)

    def _rename(self, device: str) -> None:
        """File the record under the device, once its name is known."""
        for suffix in (".json", ".txt"):
            self._file.with_suffix(suffix).unlink(missing_ok=True)
        self._file = self.settings.out / f"{device}-{self.settings.mode}.json"

    def _batch(self, op: str, tier: str, who: str) -> str | None:
        def keep(result: dict[str, Any]) -> None:
            self.record["measurements"].append(result)
            self._save()

        limit = self.settings.limit
        if who == "rivals" and not self.settings.dry:
            limit = max(limit, _TUNING_LIMIT)
        return self._supervisor.run(self._new_batch(op, tier, who), limit, keep)

    def _new_batch(self, op: str, tier: str, who: str) -> Batch:
        dry = self.settings.dry
        return Batch(
            op=op,
            tier=tier,
            who=who,
            device="cpu" if dry else "cuda",
            seconds=0.0 if dry else 0.8,
            rounds=(2, 2) if dry else (5, 100),
            seed=self.record["seed"],
            deadline=self._deadline,
            rivals=[str(rival) for rival in self.settings.rivals],
            choices=str(self._choices),
        )

    def _tests(self) -> Iterable[tuple[str, list[str]]]:
        """Yield a name and the arguments of pytest for each group of tests."""
        folder = ROOT / "tests" / "ops"
        if self.settings.dry:
            yield "timestep_features", [str(folder / "test_timestep_features.py"), "-k", "refus"]
            return
        for op in TIERS:
            files = sorted(folder.glob(f"test_{op}*.py"), key=lambda path: path.stem)
            here = [str(f) for f in files if not f.stem.endswith(_NO_GPU_NEEDED)]
            yield op, [*here, "-k", "not without_spills", "-m", "gpu or not slow"]
        others = [f for f in sorted(folder.parent.rglob("test_*.py")) if f.parent != folder]
        marked = [str(f) for f in others if "mark.gpu" in f.read_text(encoding="utf-8")]
        yield "gpu", [*marked, "-m", "gpu"]

    def _pytest(self, name: str, arguments: list[str]) -> str | None:
        events = self._place.scratch / f"tests-{name}.jsonl"
        self._place.environment[VARIABLE] = str(events)
        import_path = " ".join(shlex.quote(str(entry)) for entry in self._place.path)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", "benchmarks.gpu.pytest_events", "--continue-on-collection-errors"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        # The project's own options name plugins that need not be installed here.
        command += ["-o", f"pythonpath={import_path}", "-o", "addopts=--import-mode=importlib"]
        workers = min(8, (os.cpu_count() or 1) - 1)
        if workers > 1 and not self.settings.dry and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers), "--dist", "loadfile"]
        reason = self._place.run([*command, *arguments], self._limit(_TESTS_LIMIT))
        found = counts(events)
        self.record["tests"].append({"name": name, **found})
        if reason and not reason.startswith("stopped") and found["failed"]:
            return f"{found['failed']} of {sum(found[k] for k in OUTCOMES)} tests failed"
        return f"{reason}, {found['failed']} tests failed" if found["failed"] and reason else reason

    def _limit(self, seconds: float) -> float:
        return min(seconds, self._deadline - time.time())

    def _save(self) -> None:
        """Write the record and the table so that a kill at any moment leaves whole files."""
        self.record["elapsed_seconds"] = round(time.time() - self._started, 1)
        for path, text in (
            (self._file, json.dumps(self.record, indent=1) + "\n"),
            (self._file.with_suffix(".txt"), table(self.record)),
        ):
            temporary = path.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)


OUTCOMES = ("passed", "failed", "skipped")


def counts(events: Path) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, and why the first ones failed."""
    found: dict[str, Any] = dict.fromkeys(OUTCOMES, 0)
    failures = []
    lines = events.read_text(encoding="utf-8").splitlines() if events.exists() else []
    for line in lines:
        event = json.loads(line)
        found[event["outcome"]] += 1
        if event["outcome"] == "failed":
            failures.append({"test": event["test"], "why": event["why"]})
    return {**found, "failures": failures[:20]}


def commit(root: Path, otherwise: str | None) -> dict[str, Any]:
    """Return the commit of the sources and whether they differ from it, None if nothing tells."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(root), *arguments]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head or otherwise, "changed": None if changed is None else bool(changed)}
