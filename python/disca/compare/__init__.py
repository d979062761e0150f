# SPDX-License-Identifier: Apache-2.0
"""The comparison of all sampling methods and its report."""
