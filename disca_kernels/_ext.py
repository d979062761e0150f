# SPDX-License-Identifier: Apache-2.0
"""Lazy loader of the compiled extension ``disca_kernels._C``."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

from disca_kernels._version import __version__

_HOW_TO_BUILD = "build it with `pip install .` (or `make install`), which needs a C++17 compiler"


class ExtensionError(ImportError):
    """``disca_kernels._C`` cannot be used; the message says why and what would help."""


@functools.cache
def _try_load() -> tuple[ModuleType | None, str | None]:
    """Import ``_C`` once; return the module, or the reason why there is none."""
    try:
        module = importlib.import_module("disca_kernels._C")
    except ImportError as error:
        files = sorted(p.name for p in Path(__file__).parent.glob("_C.*") if p.suffix != ".pyi")
        if not files:
            return None, f"disca_kernels._C was not built; {_HOW_TO_BUILD}"
        found = ", ".join(files)
        return None, f"disca_kernels._C is there ({found}) but does not load: {error}"
    built_for = module.build_info()["version"]
    if built_for != __version__:
        stale = f"disca_kernels._C was built for version {built_for}, this is {__version__}"
        return None, f"{stale}; {_HOW_TO_BUILD}"
    return module, None


def load() -> ModuleType:
    """Return the compiled extension.

    Raises:
        ExtensionError: The extension was not built, does not load, or belongs to another version.
    """
    module, reason = _try_load()
    if module is None:
        raise ExtensionError(reason)
    return module


def why_not() -> str | None:
    """Return why the compiled extension cannot be used, or None when it can."""
    return _try_load()[1]


# What torch.compiler.assume_constant_result sets: a compiler cannot trace an import.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
