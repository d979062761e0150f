# SPDX-License-Identifier: Apache-2.0
"""Calls that are answered from the value: queries, comparisons, and piecewise constants."""

from __future__ import annotations

from torch import Tensor

from disca_kernels.dual.registry import add_handler, constant_handler, spellings

QUERIES = """
    dim ndimension size stride numel nelement element_size storage_offset is_contiguous is_complex
    is_floating_point is_signed is_inference get_device is_same_size is_nonzero is_pinned
    is_conj is_neg result_type __len__ __hash__ __repr__ __format__ __bool__
    register_hook
""".split()

ATTRIBUTES = """
    shape dtype device layout ndim itemsize nbytes requires_grad is_leaf grad_fn is_cuda is_cpu
    is_meta is_sparse is_sparse_csr is_quantized is_nested is_mps is_xpu is_mkldnn is_vulkan is_ort
    is_maia is_ipu is_xla is_mtia names output_nr _version name retains_grad grad _backward_hooks
    _grad_fn _is_param
""".split()

COMPARISONS = """
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal allclose isclose
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ isnan isinf isfinite isposinf isneginf
    isreal signbit all any logical_and logical_or logical_not logical_xor argmax argmin argsort
    searchsorted bucketize count_nonzero nonzero argwhere
""".split()

#: The derivative is zero wherever it exists. ``detach`` says so on purpose.
PIECEWISE_CONSTANT = """
    detach floor ceil round trunc fix sign sgn heaviside floor_divide __floordiv__
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full
""".split()

for _name in (*QUERIES, *COMPARISONS, *PIECEWISE_CONSTANT):
    for _func in spellings(_name):
        add_handler(_func, constant_handler)
for _name in ATTRIBUTES:
    if hasattr(Tensor, _name) and hasattr(getattr(Tensor, _name), "__get__"):
        add_handler(getattr(Tensor, _name).__get__, constant_handler)
