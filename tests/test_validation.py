# SPDX-License-Identifier: Apache-2.0
"""Malformed operands of the operations: one error that says what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from disca_kernels import adaln_modulate, adaln_modulate_jvp, attention_jvp

Q = torch.zeros(1, 2, 3, 8)
X, M = torch.zeros(1, 3, 8), torch.zeros(1, 8)


@pytest.mark.parametrize(
    ("primals", "tangents", "error", "match"),
    [
        ((Q, Q), (Q, Q), ValueError, r"3 primals are needed, got 2; expected \(q, k, v\)"),
        (Q, Q, TypeError, r"primals must be a tuple of 3 \(q, k, v\), got Tensor"),
        ((Q, Q, Q), None, TypeError, "tangents must be a tuple of 3 .*, got NoneType"),
        ((Q, Q, Q), (1.0, None, None), TypeError, "q_dot must be a tensor or None, got float"),
    ],
)
def test_malformed_operands_of_attention(
    primals: Any, tangents: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        attention_jvp(primals, tangents)


@pytest.mark.parametrize(
    ("primals", "tangents", "error", "match"),
    [
        ((X, M), (X, M), ValueError, r"3 to 5 primals are needed, got 2; expected \(x, shift,"),
        ((X, M, M), None, TypeError, "tangents must be a tuple of 3 to 5"),
        ((X, M, M), (None, "a", None), TypeError, "shift_dot must be a tensor or None, got str"),
    ],
)
def test_malformed_operands_of_adaln_modulate(
    primals: Any, tangents: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        adaln_modulate_jvp(primals, tangents)


@pytest.mark.parametrize(
    ("eps", "error"),
    [(-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("a", TypeError)],
)
def test_eps_is_checked(eps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="eps must be"):
        adaln_modulate(X, M, M, eps=eps)
    with pytest.raises(error, match="eps must be"):
        adaln_modulate_jvp((X, M, M), (X, None, None), eps=eps)
