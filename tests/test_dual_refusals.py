# SPDX-License-Identifier: Apache-2.0
"""Wherever a value would silently lose its tangent, dual.jvp raises and names the function."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disca_kernels import dual
from disca_kernels.dual import TangentError
from disca_kernels.dual.registry import FAMILIES
from disca_kernels.dual.tensor import HANDLERS

X, X_DOT = torch.randn(3, 4), torch.randn(3, 4)


def run(func):
    return dual.jvp(func, (X,), (X_DOT,))


def copied_into(x):
    torch.zeros(3, 4).copy_(x)


def written_by_index(x):
    torch.zeros(3, 4)[0] = x[0]


def added_in_place(x):
    plain = torch.zeros(3, 4)
    plain += x


def updated_in_place(x):
    y = x * 2
    y += 1


def assigned_data(x):
    x.data = torch.zeros(3, 4)


LOSSES = {
    "Tensor.item": lambda x: x.sum().item(),
    "Tensor.tolist": lambda x: x.tolist(),
    "Tensor.numpy": lambda x: x.numpy(),
    "Tensor.__array__": lambda x: np.sin(x),
    "Tensor.__float__": lambda x: math.sin(x[0, 0]),
    "Tensor.__int__": lambda x: int(x[0, 0]),
    "Tensor.__complex__": lambda x: complex(x[0, 0]),
    "Tensor.data": lambda x: x.data,
    "Tensor.data_ptr": lambda x: x.data_ptr(),
    "Tensor.untyped_storage": lambda x: x.untyped_storage(),
    "Tensor.__dlpack": lambda x: torch.from_dlpack(x),
    "Tensor.new_tensor": lambda x: x.new_tensor(x),
    "Tensor.__deepcopy__": copy.deepcopy,
    "Tensor.__reduce_ex__": pickle.dumps,
    "Tensor.long": lambda x: x.long(),
    "Tensor.bool": lambda x: x.bool(),
    "Tensor.int": lambda x: x.int(),
    "Tensor.short": lambda x: x.short(),
    "Tensor.char": lambda x: x.char(),
    "Tensor.byte": lambda x: x.byte(),
    "Tensor.to": lambda x: x.to(torch.int32),
    "Tensor.type": lambda x: x.type(torch.int64),
    "Tensor.view": lambda x: x.view(torch.int32),
    "Tensor.sum": lambda x: x.sum(dtype=torch.int64),
    "torch.bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "Tensor.backward": lambda x: x.sum().backward(),
    "torch.autograd.grad": lambda x: torch.autograd.grad(x.sum(), x),
    "Tensor.copy_": copied_into,
    "Tensor.__setitem__": written_by_index,
    "Tensor.add_": lambda x: (added_in_place(x), updated_in_place(x)),
    "Tensor.data.__set__": assigned_data,
    "Tensor.zero_": lambda x: x.zero_(),
    "torch.add": lambda x: torch.add(x, 1, out=torch.empty(3, 4)),
    "functional.relu": lambda x: F.relu(x, inplace=True),
    "functional.silu": lambda x: nn.SiLU(inplace=True)(x),
    "functional.dropout": lambda x: F.dropout(x, 0.5, True, True),
    "dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "torch.tensor": lambda x: torch.tensor(x),
    "torch.vmap": lambda x: torch.vmap(torch.sin)(x),
    "torch.func.grad": lambda x: torch.func.grad(torch.sum)(x),
    "aten.mul_": lambda x: torch.ops.aten.mul_(x * 1, x),
    "lstm": lambda x: nn.LSTM(4, 2)(x),
    "dual.jvp": lambda x: dual.jvp(torch.sin, (X,), (X_DOT,)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("name", LOSSES)
def test_names_the_function(name):
    with pytest.raises(TangentError) as caught:
        run(LOSSES[name])
    assert name in str(caught.value)


def test_data_of_a_plain_tensor_cannot_be_replaced():
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        run(lambda x: setattr(torch.zeros(3, 4), "data", x))


def test_parameter_cannot_be_made():
    with pytest.raises(RuntimeError, match="Creating a Parameter"):
        run(nn.Parameter)


@torch.library.custom_op("disca_test::double", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x * 2


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


class Legacy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


class Doubled(torch.autograd.Function):
    """The recipe for operators: opaque inside, with a tangent of its own."""

    @staticmethod
    def forward(x):
        return opaque(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return dy * 2

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot * 2


@pytest.fixture
def _clean_table():
    handlers, families = dict(HANDLERS), dict(FAMILIES)
    yield
    for table, before in ((HANDLERS, handlers), (FAMILIES, families)):
        table.clear()
        table.update(before)


class TestForeignFunctions:
    @pytest.mark.parametrize(
        "call", [opaque, torch.ops.disca_test.double, torch.ops.disca_test.double.default]
    )
    def test_opaque_operator_is_refused(self, call):
        with pytest.raises(TangentError, match=r"disca_test\.double"):
            run(call)

    def test_opaque_operator_inside_an_overridable_function_is_refused(self):
        def library_call(x):
            if torch.overrides.has_torch_function((x,)):
                return torch.overrides.handle_torch_function(library_call, (x,), x)
            return opaque(x).sin()

        with pytest.raises(TangentError, match=r"disca_test\.double"):
            run(library_call)

    def test_function_with_jvp_inside_an_overridable_function(self):
        def library_call(x):
            if torch.overrides.has_torch_function((x,)):
                return torch.overrides.handle_torch_function(library_call, (x,), x)
            return Doubled.apply(x).sin()

        _, out_dot = run(library_call)
        torch.testing.assert_close(out_dot, 2 * X_DOT * (2 * X).cos())

    @pytest.mark.usefixtures("_clean_table")
    def test_opaque_operator_with_a_rule(self):
        @dual.rule(opaque)
        def _(out, x):
            return 2 * dual.tangent(x)

        for call in (opaque, torch.ops.disca_test.double):
            out, out_dot = run(call)
            torch.testing.assert_close(out, 2 * X)
            torch.testing.assert_close(out_dot, 2 * X_DOT)

    def test_function_without_jvp_is_refused(self):
        with pytest.raises(TangentError, match=r"Legacy\.apply"):
            run(Legacy.apply)

    @pytest.mark.usefixtures("_clean_table")
    def test_function_with_a_rule(self):
        @dual.rule(Legacy)
        def _(out, x):
            return 2 * dual.tangent(x)

        _, out_dot = run(Legacy.apply)
        torch.testing.assert_close(out_dot, 2 * X_DOT)

    @pytest.mark.parametrize("apply", [Doubled.apply, lambda x: Doubled.apply(x)])
    def test_function_with_jvp(self, apply):
        weight = torch.randn(3, 4, requires_grad=True)
        out, out_dot = run(lambda x: apply(x * weight))
        torch.testing.assert_close(out_dot, (2 * X_DOT * weight).detach())
        (grad,) = torch.autograd.grad(out.sum(), weight)
        torch.testing.assert_close(grad, 2 * X)

    def test_apply_is_restored(self):
        plain = Legacy.apply(X)
        with pytest.raises(TangentError):
            run(Legacy.apply)
        assert "apply" not in torch.autograd.function._SingleLevelFunction.__dict__
        torch.testing.assert_close(Legacy.apply(X), plain)

    def test_reentrant_checkpoint_is_refused(self):
        with pytest.raises(TangentError, match=r"CheckpointFunction.*use_reentrant=False"):
            run(lambda x: checkpoint(torch.sin, x, use_reentrant=True))

    @pytest.mark.usefixtures("_clean_table")
    def test_tracked_tangent_of_a_fused_rule_is_refused(self):
        weight = torch.ones(3, 4, requires_grad=True)

        @dual.rule(opaque, fused=True)
        def _(x):
            return 2 * dual.primal(x), 2 * dual.tangent(x) * weight

        with pytest.raises(TangentError, match=r"disca_test\.double.*requires grad"):
            run(opaque)

    def test_rule_needs_a_callable(self):
        with pytest.raises(TypeError, match="takes callables"):
            dual.rule("torch.sin")


class TestAllowed:
    def test_queries_comparisons_and_control_flow(self):
        def func(x):
            assert isinstance(x, Tensor)
            assert x.shape == (3, 4)
            assert (x.dtype, x.device, x.ndim, x.dim(), len(x)) == (X.dtype, X.device, 2, 2, 3)
            assert (x.numel(), x.size(1), x.stride(), x.is_contiguous()) == (12, 4, (4, 1), True)
            assert (x.requires_grad, x.grad_fn, x.is_leaf, x.is_cuda) == (False, None, True, False)
            assert x.layout == torch.strided
            assert torch.is_floating_point(x)
            assert f"{x[0, 0]:.3f}" == f"{X[0, 0]:.3f}"
            assert "DualTensor" in repr(x)
            assert not torch.isnan(x).any()
            assert x.argmax() == X.argmax()
            assert {x: 1}[x] == 1
            if x.sum() > 1e9 or not x[0, 0]:
                return x
            scale = torch.ones_like(x) * x.new_ones(4)
            return torch.stack([row * (row > 0) for row in x]) * scale + x.round()

        out, out_dot = run(func)
        torch.testing.assert_close(out, X * (X > 0) + X.round())
        torch.testing.assert_close(out_dot, X_DOT * (X > 0))

    def test_detach_drops_the_tangent_on_purpose(self):
        _, out_dot = run(lambda x: x * x.detach())
        torch.testing.assert_close(out_dot, X_DOT * X)
        assert run(lambda x: x.detach().sum().item() * x)[1].shape == X.shape


class TestArguments:
    @pytest.mark.parametrize(
        ("primals", "tangents", "error", "message"),
        [
            (X, X_DOT, TypeError, "tuple of primals"),
            ((X,), (X_DOT, None), TypeError, "1 primals and 2 tangents"),
            ((X,), (X_DOT[:2],), ValueError, r"primals\[0\] has shape \(3, 4\).*\(2, 4\)"),
            ((X,), (X_DOT.double(),), TypeError, "float32 on cpu, its tangent torch.float64"),
            ((X,), (1.0,), TypeError, "its tangent is a float"),
            ((X.long(),), (X_DOT.long(),), TypeError, "int64, which has no tangent"),
            (([X, X],), ([X_DOT],), TypeError, "same structure"),
            (({"a": X},), ({"b": X_DOT},), TypeError, "same structure"),
            ((3.0,), (1.0,), TypeError, "same structure"),
        ],
    )
    def test_rejects(self, primals, tangents, error, message):
        with pytest.raises(error, match=message):
            dual.jvp(lambda *args: args[0], primals, tangents)

    def test_dual_that_outlives_its_pass_is_refused(self):
        kept = []
        run(lambda x: kept.append(x * 2) or x)
        assert not hasattr(kept[0], "_tangent")
        with pytest.raises(TangentError, match=r"torch\.Tensor\.mul was called.*is over"):
            kept[0] * 2
        with pytest.raises(TangentError, match="is over"):
            dual.jvp(torch.sin, (kept[0],), (X_DOT,))

    def test_a_failed_pass_leaves_nothing_behind(self):
        with pytest.raises(TangentError):
            run(lambda x: x.item())
        assert run(torch.sin)[0].shape == X.shape
