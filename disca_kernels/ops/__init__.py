# SPDX-License-Identifier: Apache-2.0
"""One package per operation; the public functions are re-exported by ``disca_kernels``."""
