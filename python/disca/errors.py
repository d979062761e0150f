# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause and a command line reports in one line."""

__all__ = ["UserError"]


class UserError(ValueError):
    """What the user asked for cannot be done; the message says what was expected and what came.

    The command line prints it without a traceback and exits with code 2.
    """
