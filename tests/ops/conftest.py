# SPDX-License-Identifier: Apache-2.0
"""Settings shared by the tests of the operations."""

import os

from disca_kernels.testing.interpreter import repair_bfloat16

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_bfloat16()
