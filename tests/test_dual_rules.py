# SPDX-License-Identifier: Apache-2.0
"""Every rule of dual.jvp against torch.func.jvp and against the plain forward."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from disca_kernels import dual
from disca_kernels.dual.registry import FAMILIES
from disca_kernels.dual.tensor import function_name
from tests.dual_cases import BY_FUNCTION, CASES, OURS, WITHOUT_A_CASE, Var, live_saved


def cases_of(func: Any) -> list[Any]:
    return BY_FUNCTION.get(func) or CASES.get(FAMILIES[func], [])


ALL = [
    pytest.param(func, case, id=f"{function_name(func)}-{i}")
    for func in FAMILIES
    for i, case in enumerate(cases_of(func))
]


def test_every_rule_has_a_case():
    missing = {
        function_name(func)
        for func, family in FAMILIES.items()
        if not cases_of(func) and family not in WITHOUT_A_CASE
    }
    assert not missing


def prepare(func, case):
    """The call as a function of its tensors, and the tensors."""
    args, kwargs = case if isinstance(case, tuple) else (case, {})
    leaves, spec = pytree.tree_flatten((list(args), kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Var)]
    tensors = [leaves[i].draw() for i in places]

    def call(*values: Tensor) -> Any:
        torch.manual_seed(1)
        for place, value in zip(places, values, strict=True):
            leaves[place] = value
        call_args, call_kwargs = pytree.tree_unflatten(list(leaves), spec)
        return func(*call_args, **call_kwargs)

    return call, tensors


def subsets(n: int) -> list[tuple[bool, ...]]:
    return [chosen for chosen in itertools.product((True, False), repeat=n) if any(chosen)]


def reference(call, tensors, tangents):
    """torch.func.jvp with constants closed over, as it wants them."""
    dotted = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def partial(*values: Tensor) -> Any:
        full = list(tensors)
        for i, value in zip(dotted, values, strict=True):
            full[i] = value
        return call(*full)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(
            partial, tuple(tensors[i] for i in dotted), tuple(tangents[i] for i in dotted)
        )


@pytest.mark.parametrize(("func", "case"), ALL)
def test_rule(func, case):
    torch.manual_seed(0)
    call, tensors = prepare(func, case)
    plain = call(*tensors)
    for chosen in subsets(len(tensors)):
        tangents = [
            torch.randn_like(x) if take else None for x, take in zip(tensors, chosen, strict=True)
        ]
        out, out_dot = dual.jvp(call, tensors, tangents)
        _, expected_dot = reference(call, tensors, tangents)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
        tolerance = 1e-6 if pytree.tree_leaves(out)[0].dtype == torch.float32 else 1e-11
        torch.testing.assert_close(
            out_dot, pytree.tree_map(torch.detach, expected_dot), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(("func", "case"), ALL)
def test_gradient_and_memory_of_the_value(func, case):
    torch.manual_seed(0)
    call, tensors = prepare(func, case)
    leaves = [x.clone().requires_grad_() for x in tensors]
    dots = [torch.randn_like(x) for x in tensors]
    plain, plain_live = live_saved(lambda: call(*leaves))
    (out, out_dot), live = live_saved(lambda: dual.jvp(call, leaves, dots))
    assert not any(dot.requires_grad for dot in pytree.tree_leaves(out_dot))
    if func not in KEEPS_OTHER_TENSORS:
        assert live == plain_live
    got, expected = gradients(out, leaves), gradients(plain, leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


#: Our attention stands in for PyTorch's, and keeps what ours keeps.
KEEPS_OTHER_TENSORS = (torch.nn.functional.scaled_dot_product_attention,)


def gradients(tree, leaves):
    loss = sum((x.abs().sin().sum() for x in pytree.tree_leaves(tree)), torch.zeros(()))
    return torch.autograd.grad(loss, leaves, allow_unused=True)


STEPS = [
    lambda x, y: x * y,
    lambda x, y: x + y.tanh(),
    lambda x, y: torch.where(x > 0, x, y * 0.3),
    lambda x, y: x / (y.square() + 1),
    lambda x, y: (x.unsqueeze(-1) * y.unsqueeze(-2)).mean(-1),
    lambda x, y: torch.cat([x, y], -1)[..., ::2],
    lambda x, y: torch.softmax(x, -1) - y,
    lambda x, y: torch.nn.functional.layer_norm(x, x.shape[-1:]) + y,
    lambda x, y: torch.nn.functional.rms_norm(x, x.shape[-1:]) * y,
    lambda x, y: torch.nn.functional.silu(x) + torch.nn.functional.gelu(y),
    lambda x, y: torch.stack([x, y], 1).flatten(1).chunk(2, 1)[1],
    lambda x, y: x @ y.T @ x * 0.1,
    lambda x, y: x.roll(1, 0).clamp(-1, 1) + y.flip(1),
    lambda x, y: torch.nn.functional.normalize(x, dim=-1) + y,
    lambda x, y: torch.maximum(x, y) - x.std(-1, keepdim=True),
    lambda x, y: 2.0**x - 1 / (1 + y.abs()),
    lambda x, y: torch.einsum("ij,kj->ik", x, y).sin() @ y,
]


@pytest.mark.parametrize("seed", range(30))
def test_random_composition(seed):
    rng = random.Random(seed)
    steps = rng.choices(STEPS, k=6)

    def func(x: Tensor, y: Tensor) -> Tensor:
        for step in steps:
            x, y = y, step(x, y)
        return x * y

    torch.manual_seed(seed)
    primals = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    tangents = torch.randn(4, 6).double(), torch.randn(4, 6).double()
    out, out_dot = dual.jvp(func, primals, tangents)
    expected, expected_dot = torch.func.jvp(func, primals, tangents)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out_dot, expected_dot, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("func", OURS)
def test_our_operations_have_fused_rules(func):
    assert func in FAMILIES
