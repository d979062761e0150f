# SPDX-License-Identifier: Apache-2.0
"""What a DiT block costs in forward mode: which kernels it calls, what recomputation repeats."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name

from disca.models import State
from disca_kernels import dual, use_backend
from disca_kernels.dual.tensor import DualTensor, has_dual
from disca_kernels.operation_library import KernelOperators
from disca_kernels.ops.attention import operators
from tests.model.tiny import TINY_1_5, inputs, model

# Views, and the copy that joins attention's heads again.
LAYOUT = {"__getitem__", "chunk", "transpose", "flatten", "shape", "size"}
SINGLE = {"linear": 4, "adaln_modulate": 1, "qk_norm_rope": 1, "attention": 1}
SINGLE |= {"gelu_tanh": 1, "gated_residual": 1}
DOUBLE = {"linear": 10, "adaln_modulate": 2, "qk_norm_rope": 1, "attention": 1}
DOUBLE |= {"gated_residual_adaln": 2, "gelu_tanh": 2, "gated_residual": 2}


class DualCalls(TorchFunctionMode):
    """Count the functions that get a tensor with a tangent."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if has_dual(args) or has_dual(kwargs or {}):
            name = (resolve_name(func) or func.__name__).removesuffix(".__get__")
            self.found[name.rpartition(".")[2]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches(monkeypatch):
    """Record which form of which operation's kernels runs: fwd, bwd, dual or tangent."""
    found = Counter()
    plain_run = KernelOperators.run

    def run(self, form, *args):
        found[self.operation.name, form] += 1
        return plain_run(self, form, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KernelOperators, "run", run)
        for form in ("fwd", "bwd", "dual", "tangent"):
            operator = getattr(operators, form)

            def counted(*args, form=form, operator=operator):
                found["attention", form] += 1
                return operator(*args)

            patch.setattr(operators, form, counted)
        yield found


def block_case(kind, **size):
    changes = {"split_qkv": True} if kind == "split" else {}
    net = model(hidden=48, rope_dims=(8, 8, 8), **changes)
    x, t, _, cond = inputs(net.config, **size)
    block = net.single_blocks[0] if kind == "single" else net.double_blocks[0]
    with torch.no_grad():
        state = net.embed(x, t, None, cond)
    if kind == "single":
        state = state.with_tokens(state.tokens)

    def run(*tensors):
        *parts, vec = tensors
        fields = state.n_video, vec, state.rope, state.kv_lengths, state.grid
        return block(State(tuple(parts), *fields)).parts

    return run, (*state.parts, state.vec)


@pytest.mark.parametrize("kind", ["single", "double", "split"])
def test_a_block_in_forward_mode_calls_fused_kernels_and_linear_layers(kind, monkeypatch):
    run, tensors = block_case(kind)
    with DualCalls() as calls:
        dual.jvp(run, tensors, tuple(map(torch.ones_like, tensors)))
    computed = {name: n for name, n in calls.found.items() if name not in LAYOUT}
    assert computed == (SINGLE if kind == "single" else DOUBLE)


@pytest.mark.parametrize("kind", ["single", "double"])
def test_a_block_in_forward_mode_launches_each_kernel_once(kind, monkeypatch):
    """Value and tangent come from the same launch; a backward pass adds the gradients alone."""
    run, tensors = block_case(kind, batch=2, size=(4, 12, 24), text=6)
    expected = {k: n for k, n in (SINGLE if kind == "single" else DOUBLE).items() if k != "linear"}
    tensors = tuple(x.requires_grad_() for x in tensors)
    with launches(monkeypatch) as found, use_backend("cpu"):
        outputs, _ = dual.jvp(run, tensors, tuple(map(torch.ones_like, tensors)))
        assert {name: n for (name, form), n in found.items() if form == "dual"} == expected
        assert {form for _, form in found} == {"dual"}
        found.clear()
        sum(y.square().sum() for y in outputs).backward()
        gradients = {name: n for (name, form), n in found.items() if form == "bwd"}
        assert {form for _, form in found} == {"bwd"}
        assert gradients == expected


@pytest.mark.parametrize("changes", [{}, TINY_1_5], ids=["1.0", "1.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recomputation_in_forward_mode_changes_memory_not_results(changes, dtype):
    """Forward and tangent once, then the value alone once more, then the gradients."""
    net = model(dtype, **{**changes, "mean_flow": True})
    x, t, r, cond = inputs(net.config, dtype=dtype)
    runs = []
    for block in net.blocks:
        block.register_forward_pre_hook(
            lambda _, args: runs.append(type(args[0].parts[0]) is DualTensor)
        )

    def step():
        kept = []
        net.zero_grad()
        runs.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
            out, out_dot = dual.jvp(
                lambda x, t: net(x, t, r, cond), (x, t), (x, torch.ones_like(t))
            )
        forward = list(runs)
        out.square().sum().backward()
        return (
            out,
            out_dot,
            [p.grad for p in net.parameters()],
            len(kept),
            forward,
            runs[len(forward) :],
        )

    plain = step()
    net.gradient_checkpointing = True
    again = step()
    blocks = len(net.blocks)
    assert plain[4:] == ([True] * blocks, [])
    assert again[4:] == ([True] * blocks, [False] * blocks)
    assert torch.equal(again[0], plain[0])
    assert torch.equal(again[1], plain[1])
    for grad, expected in zip(again[2], plain[2], strict=True):
        assert (grad is None and expected is None) or torch.equal(grad, expected)
    assert again[3] < plain[3] / 2


def test_state_joins_and_parts_streams_without_copies():
    net = model()
    x, t, _, cond = inputs(net.config)
    apart = net.embed(x, t, None, cond)
    joined = apart.with_tokens(apart.tokens)
    assert len(apart.parts) == 2
    assert apart.shape == joined.shape == joined.tokens.shape
    assert joined.tokens is joined.parts[0]
    assert apart.streams == (apart.video, apart.text)
    for stream, again in zip(apart.streams, joined.streams, strict=True):
        assert torch.equal(stream, again)
        assert again.data_ptr() in range(
            joined.tokens.data_ptr(), joined.tokens.data_ptr() + joined.tokens.nbytes
        )
