# SPDX-License-Identifier: Apache-2.0
"""Print the relative error of attention's tangent against float64, as Markdown tables.

    python -m benchmarks.accuracy_attention [--device cuda] [--seeds 3] [--part kernels long]

On a CPU the Triton kernels take part under `TRITON_INTERPRET=1`, on small shapes.
jvp_flash_attention takes part if it is installed, on as many queries as keys, which it needs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from benchmarks import attention_centres as centres
from disca_kernels import attention, attention_jvp, attention_tangent, why_not
from disca_kernels.ops.attention.cases_drift import (
    DRIFTS,
    KINDS,
    DriftCase,
    Triple,
    exact_tangent,
    relative_error,
    uncentred_tangent,
)

Method = Callable[[Triple, Triple], Tensor]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
MEANS = (0.0, 1.0, 3.0)
PARTS = ("rules", "kernels", "interpreted", "masks", "long", "rival")


def rules() -> dict[str, Method]:
    """Rules for the centre, emulated."""
    return {
        "none": uncentred_tangent,
        "first block": lambda p, t: centres.fixed_tangent(p, t, "first block"),
        "mean key": lambda p, t: centres.fixed_tangent(p, t, "mean key"),
        "running mean": centres.running_tangent,
        "sample": lambda p, t: centres.sampled_tangent(p, t).o_dot,
        "sample, checked": centres.checked_tangent,
    }


def kernels(device: str, interpreted: bool = False, **options: object) -> dict[str, Method]:
    """Return the ways to the tangent on each backend that runs here, the usual formula first.

    Args:
        device: where the operands are.
        interpreted: whether to return the Triton kernels on a CPU, and nothing else but the
            formula; they are left out otherwise.
        options: of `attention`; the formula knows none.
    """
    probe = torch.empty(1, 1, 1, 8, device=device, dtype=torch.bfloat16)
    methods: dict[str, Method] = {} if options else {"usual formula": uncentred_tangent}
    for backend in ("eager", "cpu", "triton", "cuda"):
        in_interpreter = backend == "triton" and device == "cpu"
        if in_interpreter != interpreted or why_not("attention", backend, probe):
            continue
        call = {**options, "backend": backend}
        if backend == "eager":  # one computation, whatever the call
            methods[backend] = partial(_fused, call)
            continue
        methods[f"{backend}, fused"] = partial(_fused, call)
        methods[f"{backend}, tangent alone"] = partial(_alone, call)
        methods[f"{backend}, over a value"] = partial(_over_a_value, call)
    return methods


def _fused(call: dict[str, Any], primals: Triple, tangents: Triple) -> Tensor:
    return attention_jvp(primals, tangents, **call)[1]


def _alone(call: dict[str, Any], primals: Triple, tangents: Triple) -> Tensor:
    return jvp(lambda *x: attention(*x, **call), primals, tangents)[1]


def _over_a_value(call: dict[str, Any], primals: Triple, tangents: Triple) -> Tensor:
    o, lse = attention(*primals, **call, return_lse=True)
    return attention_tangent(primals, tangents, o, lse, **call)[0]


def rivals(device: str) -> dict[str, Method]:
    """Return jvp_flash_attention's value-with-tangent kernel, if it is installed, and ours."""
    if find_spec("jvp_flash_attention") is None:
        return kernels(device)
    # One fixed tile, as in its own tests.
    os.environ.setdefault("PYTEST_VERSION", "")
    from jvp_flash_attention.jvp_attention import JVPAttn
    from torch.autograd import forward_ad

    def method(primals: Triple, tangents: Triple) -> Tensor:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
            return forward_ad.unpack_dual(JVPAttn.fwd_dual(*duals)).tangent

    return {"jvp_flash_attention": method, **kernels(device)}


def errors(
    methods: dict[str, Method],
    case: DriftCase,
    seeds: int,
    device: str,
    **options: bool | Tensor | None,
) -> dict[str, list[float] | str]:
    """Return each method's relative errors, one a seed, or what it raised."""
    found: dict[str, list[float] | str] = {}
    for seed in range(seeds):
        primals, tangents = case.operands(seed, device)
        exact = exact_tangent(primals, tangents, **options)
        for name, method in methods.items():
            if isinstance(found.get(name), str):
                continue
            try:
                error = relative_error(method(primals, tangents), exact)
            except Exception as failure:
                found[name] = type(failure).__name__
            else:
                found.setdefault(name, []).append(error)
    return found


def cell(values: list[float] | str) -> str:
    """Show the median, and the largest beside it where that is another number."""
    if isinstance(values, str):
        return values
    middle, largest = f"{statistics.median(values):.1e}", f"{max(values):.1e}"
    return middle if middle == largest else f"{middle} ({largest})"


def _worst_ratio(row: list[list[float] | str]) -> str:
    if any(isinstance(values, str) for values in row):
        return ""
    return f"{max(max(values) for values in row) / max(row[0]):.2f}"


def drift_table(
    methods: dict[str, Method], base: DriftCase, seeds: int, device: str, kinds: Iterable[str]
) -> None:
    """Print a line for each kind of input and method, a column for each drift."""
    print(f"\n| input | | {' | '.join(str(d) for d in DRIFTS)} | worst / first |")
    print("|---|---|" + "---|" * (len(DRIFTS) + 1))
    for kind in kinds:
        case = DriftCase(kind, 0, base.n_q, base.n_k, base.head_dim, base.dtype, base.value_mean)
        columns = [errors(methods, case.at(drift), seeds, device) for drift in DRIFTS]
        for name in methods:
            row = [column[name] for column in columns]
            cells = " | ".join(map(cell, row))
            print(f"| {kind} | {name} | {cells} | {_worst_ratio(row)} |", flush=True)


def mask_table(
    device: str, seeds: int, title: str, case: DriftCase, **options: bool | Tensor | None
) -> None:
    """Print one line for each way on inputs of which some queries see nothing."""
    methods = kernels(device, **options)
    columns = [errors(methods, case.at(drift), seeds, device, **options) for drift in DRIFTS]
    for name in methods:
        row = [column[name] for column in columns]
        print(f"| {title} | {name} | {' | '.join(map(cell, row))} | {_worst_ratio(row)} |")


def repeats_table(base: DriftCase, seeds: int) -> None:
    """Print how many tiles of 128 queries the check sends round again, by the emulated rule."""
    print(f"\n| input | {' | '.join(str(d) for d in DRIFTS)} |")
    print("|---|" + "---|" * len(DRIFTS))
    for kind in KINDS:
        cells = []
        for drift in DRIFTS:
            case = DriftCase(kind, drift, 128, base.n_k, base.head_dim, base.dtype)
            misses = [centres.sampled_tangent(*case.operands(seed)).miss for seed in range(seeds)]
            share = sum(miss > centres.TAU for miss in misses) / seeds
            cells.append(f"{100 * share:.0f} % ({max(misses):.2f})")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def mean_table(seeds: int) -> None:
    """Print what a mean of the values does to each rule at drift 0."""
    print(f"\n| | {' | '.join(f'mean {mean:g}' for mean in MEANS)} |\n|---|" + "---|" * len(MEANS))
    methods = {
        **rules(),
        "sample, o rounded": lambda p, t: centres.sampled_tangent(p, t, exact_o=False).o_dot,
    }
    found = [errors(methods, DriftCase("plain", value_mean=m), seeds, "cpu") for m in MEANS]
    for name in methods:
        print(f"| {name} | {' | '.join(cell(column[name]) for column in found)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keys", type=int, default=2048)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    arguments = parser.parse_args()
    device, seeds, kinds = arguments.device, arguments.seeds, arguments.kinds
    print(f"Relative error of the tangent, by drift: median of {seeds} seeds (largest).")
    for name, dtype in HALF.items():
        base = DriftCase("plain", n_k=arguments.keys, dtype=dtype)
        long = DriftCase("plain", n_q=16, n_k=32768, dtype=dtype)
        small = DriftCase("plain", n_q=16, n_k=512, head_dim=64, dtype=dtype)
        square = DriftCase("plain", n_q=512, n_k=512, head_dim=64, dtype=dtype)
        tables = {
            "rules": ("Rules for the centre, emulated", rules, base, seeds),
            "kernels": (f"Kernels, {device}", partial(kernels, device), base, seeds),
            "long": (f"Kernels, {device}", partial(kernels, device), long, 1),
            "interpreted": ("Triton, interpreted", partial(kernels, "cpu", True), small, 1),
            "rival": (f"Beside jvp_flash_attention, {device}", partial(rivals, device), square, 1),
        }
        for part, (title, methods, case, repeats) in tables.items():
            if part in arguments.part:
                shape = f"{case.n_q} queries, {case.n_k} keys, D = {case.head_dim}"
                print(f"\n## {title}, {name}, {shape}")
                drift_table(methods(), case, repeats, device, kinds)
    if "rules" in arguments.part:
        print("\n## Tiles computed again (largest miss), emulated, bf16")
        repeats_table(DriftCase("plain", n_k=arguments.keys), seeds)
        print("\n## Values with a mean, plain, drift 0, emulated, bf16")
        mean_table(seeds)
    if "masks" in arguments.part:
        _masks(device, seeds)


def _masks(device: str, seeds: int) -> None:
    """Print the tables of inputs whose first or last blocks of keys are masked."""
    print(f"\n## Masks, bf16, {device}\n")
    print(f"| input | | {' | '.join(str(d) for d in DRIFTS)} | worst / first |")
    print("|---|---|" + "---|" * (len(DRIFTS) + 1))
    late = DriftCase("growing", n_q=300, n_k=200, head_dim=64)
    mask_table(device, seeds, "causal, 100 queries see nothing", late, causal=True)
    blocks = DriftCase("text", n_q=200, n_k=512, head_dim=64)
    mask_table(device, seeds, "blocks of 48", blocks, block_causal=48)
    short = DriftCase("growing", n_q=64, n_k=512, head_dim=64)
    lengths = torch.tensor([131], device=device)
    mask_table(device, seeds, "131 keys of 512", short, kv_lengths=lengths)


if __name__ == "__main__":
    sys.exit(main())
