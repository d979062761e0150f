# SPDX-License-Identifier: Apache-2.0
"""Triton functions and launch arithmetic that two or more operations use."""
