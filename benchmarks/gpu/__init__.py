# SPDX-License-Identifier: Apache-2.0
"""Every operation on the GPU of this machine: `python -m benchmarks.gpu --out DIR`."""
