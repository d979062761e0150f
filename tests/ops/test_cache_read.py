# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from disca_kernels import cache_read, cache_read_jvp
from disca_kernels.ops.cache_read.cases import CacheReadCase, cache_read_in_dtype
from disca_kernels.ops.cache_read.reference import (
    cache_read_jvp_reference,
    cache_read_reference,
)
from tests.ops.battery import DEVICE, Battery, Subject, backends, runs

BF16, F16 = torch.bfloat16, torch.float16
# Sizes on both sides of a tile; strides that a tensor descriptor reaches and others; more tiles of
# tokens than one group of programs.
CASES = [
    CacheReadCase(2, 5, 24, 16),
    CacheReadCase(2, 3, 17, 9, has_bias=False),
    CacheReadCase(2, 130, 72, 40, BF16),
    CacheReadCase(1, 7, 33, 21, BF16),
    CacheReadCase(2, 9, 40, 264, F16, moving="c"),
    CacheReadCase(1, 33, 136, 24, BF16, has_bias=False, moving="ch"),
    CacheReadCase(11, 2, 16, 264, BF16, moving="c"),
    CacheReadCase(2, 40, 70, 48),
]
BACKENDS = backends("cache_read")


class TestCacheRead(Battery):
    subject = Subject("cache_read", cache_read, cache_read_jvp, cache_read_reference, CASES)


def test_reference_is_a_linear_layer_of_the_joined_tokens():
    primals = CacheReadCase(2, 5, 24, 16, torch.float64).operands().primals
    torch.testing.assert_close(cache_read_reference(*primals), cache_read_in_dtype(*primals))


@pytest.mark.parametrize("moving", ["chwb", "c", "h", "w", "b", "cw", "hb", ""])
@pytest.mark.parametrize("has_bias", [True, False])
def test_closed_formula_of_the_tangent(has_bias, moving):
    case = CacheReadCase(2, 5, 12, 7, torch.float64, has_bias, moving)
    primals, tangents, _ = case.operands()
    given = [i for i, x in enumerate(primals) if x is not None]
    zeros = [torch.zeros_like(primals[i]) if tangents[i] is None else tangents[i] for i in given]
    expected = torch.func.jvp(cache_read_reference, tuple(primals[i] for i in given), tuple(zeros))
    torch.testing.assert_close(cache_read_jvp_reference(primals, tangents), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_stream_of_a_joint_sequence(backend):
    """The double-stream predictor reads slices along the tokens of a batch."""
    primals, tangents, _ = CacheReadCase(2, 12, 24, 16, BF16, moving="c").operands(device=DEVICE)
    whole, whole_dot = cache_read_jvp(primals, tangents, backend=backend)

    def part(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return (*(None if x is None else x[:, 3:8] for x in tensors[:2]), *tensors[2:])

    y, y_dot = cache_read_jvp(part(primals), part(tangents), backend=backend)
    torch.testing.assert_close(y, whole[:, 3:8], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y_dot, whole_dot[:, 3:8], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_non_finite_token_stays_alone(backend):
    primals, tangents, _ = CacheReadCase(2, 6, 20, 24, BF16, moving="c").operands(device=DEVICE)
    clean = cache_read_jvp(primals, tangents, backend=backend)
    cache = primals[1].clone()
    cache[1, 2, 3] = torch.nan
    spoilt = cache_read_jvp((primals[0], cache, *primals[2:]), tangents, backend=backend)
    for x, expected in zip(spoilt, clean, strict=True):
        assert x[1, 2].isnan().all()
        x[1, 2] = expected[1, 2]
        assert torch.equal(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (2, 0, 8, 4)])
def test_empty(shape, backend):
    primals, tangents, cotangents = CacheReadCase(*shape).operands(device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in primals]
    y, y_dot = cache_read_jvp(tuple(leaves), tangents, backend=backend)
    assert y.shape == y_dot.shape == (*shape[:2], shape[3])
    gradients = torch.autograd.grad(y, leaves, cotangents)
    for gradient, x in zip(gradients, primals, strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_arguments_do_not_overflow(backend):
    current = torch.tensor([[[200.0], [-200.0]]], device=DEVICE)
    weight = torch.tensor([[1.0, 0.0]], device=DEVICE)
    leaf = current.clone().requires_grad_()
    y, y_dot = cache_read_jvp(
        (leaf, torch.zeros_like(current), weight), (torch.ones_like(current), None, None),
        backend=backend,
    )  # fmt: skip
    y.sum().backward()
    torch.testing.assert_close(y.flatten().tolist(), [200.0, 0.0])
    torch.testing.assert_close(y_dot.flatten().tolist(), [1.0, 0.0])
    torch.testing.assert_close(leaf.grad.flatten().tolist(), [1.0, 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_for_a_linear_layer(backend):
    primals, tangents, _ = CacheReadCase(2, 5, 24, 16).operands(device=DEVICE)
    narrow = [x.to(BF16) for x in (*primals, *tangents)]
    leaves = [x.detach().requires_grad_() for x in primals]
    with torch.autocast(DEVICE, dtype=BF16):
        y, y_dot = cache_read_jvp(tuple(leaves), tangents, backend=backend)
        alone = cache_read(*primals, backend=backend)
    expected, expected_dot = cache_read_jvp(tuple(narrow[:4]), tuple(narrow[4:]), backend=backend)
    assert y.dtype == BF16
    assert torch.equal(y, expected)
    assert torch.equal(y_dot, expected_dot)
    assert torch.equal(alone, expected)
    y.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_beyond_the_reach_of_32_bits(backend):
    """Two samples 2^31 elements apart; only the pages that are touched exist."""
    apart = 2**31
    primals, _, _ = CacheReadCase(2, 3, 16, 8, BF16).operands(device=DEVICE)
    storage = torch.empty(apart + 64, dtype=BF16, device=DEVICE)
    current = storage.as_strided((2, 3, 16), (apart, 16, 1))
    current.copy_(primals[0])
    y = cache_read(current, *primals[1:], backend=backend)
    assert torch.equal(y, cache_read(primals[0].contiguous(), *primals[1:], backend=backend))


@runs("cache_read", "triton", torch.empty(1, 1, 1, device=DEVICE))
@pytest.mark.parametrize(("n_channels", "described"), [(40, True), (36, False)])
def test_descriptors_where_the_strides_allow_them(n_channels, described):
    from disca_kernels.ops.cache_read import triton as launchers
    from disca_kernels.triton_common.descriptors import capability, has_descriptors

    current, cache, weight, _ = (
        CacheReadCase(1, 3, n_channels, 16, BF16).operands(device=DEVICE).primals
    )
    arrays = [current, cache, launchers._halves(weight)]
    call = launchers._call("fwd", arrays, [torch.empty(1, 3, 16, dtype=BF16, device=DEVICE)])
    offered = has_descriptors(capability(current.device), 2)
    assert call.constants["TMA"] == (described and offered)


def _operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(s, dtype=dtype) for s in ((2, 5, 8), (2, 5, 8), (4, 16), (4,))]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (5, 8), r"current must be \[B, N, C\] with at least one channel, got \[5, 8\]"),
        (0, (2, 5, 0), r"at least one channel, got \[2, 5, 0\]"),
        (
            1,
            (2, 6, 8),
            r"current is \[2, 5, 8\] float32 on cpu, cache is \[2, 6, 8\] .*another batch, resolut",
        ),
        (1, (1, 5, 8), r"cache is \[1, 5, 8\] float32 on cpu"),
        (1, (2, 5, 1), r"cache is \[2, 5, 1\] float32 on cpu"),
        (2, (4, 8), r"weight must be \[O, 2C\] = \[O, 16\] for current \[2, 5, 8\].*got \[4, 8\]"),
        (2, (16,), r"weight must be .*got \[16\]"),
        (2, (0, 16), r"weight must be .*got \[0, 16\]"),
        (3, (1,), r"bias must be \[O\] = \[4\] for weight \[4, 16\] .*got \[1\].*nothing is bro"),
        (3, (4, 1), r"bias must be .*got \[4, 1\]"),
    ],
)
def test_rejects_shapes(index, shape, message):
    operands = _operands()
    operands[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        cache_read(*operands)
    with pytest.raises(ValueError, match=message):
        cache_read_jvp(tuple(operands), (None,) * 4)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_rejects_mixed_dtypes_and_devices(index):
    name = ("current", "cache", "weight", "bias")[index]
    operands = _operands()
    narrow = [*operands]
    narrow[index] = narrow[index].bfloat16()
    message = rf"{name} must have the dtype of current; current is .* float32 .*bfloat16 on cpu"
    with pytest.raises(TypeError, match=message):
        cache_read(*narrow)
    elsewhere = [*operands]
    elsewhere[index] = elsewhere[index].to("meta")
    with pytest.raises(ValueError, match=rf"{name} must be on the device of .* on cpu,.* on meta"):
        cache_read(*elsewhere)


def test_rejects_what_is_no_tensor_of_a_supported_dtype():
    with pytest.raises(TypeError, match=r"current must be one of .*, got torch\.int64"):
        cache_read(*_operands(torch.int64))
    with pytest.raises(TypeError, match="cache must be a tensor, got NoneType"):
        cache_read(_operands()[0], None, *_operands()[2:])
    with pytest.raises(TypeError, match="bias must be a tensor, got float"):
        cache_read(*_operands()[:3], 1.0)


def test_rejects_tangents():
    primals = tuple(_operands())
    with pytest.raises(ValueError, match=r"3 to 4 tangents are needed, got 1"):
        cache_read_jvp(primals, (None,))
    with pytest.raises(ValueError, match=r"current_dot must match current \[2, 5, 8\]"):
        cache_read_jvp(primals, (torch.zeros(2, 6, 8), None, None))
    with pytest.raises(ValueError, match="bias_dot"):
        cache_read_jvp(primals[:3], (None, None, None, torch.zeros(4)))
    with pytest.raises(TypeError, match=r"cache_dot must have the dtype of cache"):
        cache_read_jvp(primals, (None, torch.zeros(2, 5, 8).double(), None))
