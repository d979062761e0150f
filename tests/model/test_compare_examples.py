# SPDX-License-Identifier: Apache-2.0
"""The example scripts run and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from disca.compare.suite import shipped_checkpoints

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fused_ops(capsys):
    load("fused_ops").main()
    out = capsys.readouterr().out
    assert "tangent" in out
    assert "nan" not in out


def test_meanflow_step(capsys):
    """Training brings the samples of one step nearer to the data than noise is."""
    load("meanflow_step").main()
    noise, one, four = map(float, re.findall(r"ring (\d\.\d+)", capsys.readouterr().out))
    assert one < noise / 2
    assert four < noise / 2


@pytest.mark.skipif(
    not (shipped_checkpoints() / "config.yaml").is_file(), reason="no checkpoints in the package"
)
def test_disca_sampling(capsys, tmp_path):
    load("disca_sampling").main(out=tmp_path / "a.gif")
    out = capsys.readouterr().out
    assert "20 full and 0 predicted" in out
    assert "8 full and 12 predicted" in out
    assert (tmp_path / "a.gif").stat().st_size > 0
