# SPDX-License-Identifier: Apache-2.0
"""Calls that are answered from the value: queries, comparisons, and piecewise constants."""

from __future__ import annotations

from disca_kernels.dual.registry import add_handler, constant_handler, spellings

QUERIES = """
    dim ndimension size stride numel nelement element_size storage_offset get_device result_type
    __hash__ __repr__ __format__ __len__ __bool__ register_hook retain_grad
"""

COMPARISONS = """
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal allclose isclose
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ isnan isinf isfinite isposinf isneginf
    isreal signbit all any logical_and logical_or logical_not logical_xor argmax argmin argsort
    searchsorted bucketize count_nonzero nonzero argwhere
"""

#: The derivative is zero wherever it exists. ``detach`` says so on purpose.
PIECEWISE_CONSTANT = """
    detach floor ceil round trunc fix sign sgn heaviside floor_divide __floordiv__
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full
"""

for _name in f"{QUERIES} {COMPARISONS} {PIECEWISE_CONSTANT}".split():
    for _func in spellings(_name):
        add_handler(_func, constant_handler)
