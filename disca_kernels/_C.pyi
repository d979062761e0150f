# SPDX-License-Identifier: Apache-2.0
from typing import Any

def build_info() -> dict[str, Any]: ...
