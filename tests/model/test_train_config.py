# SPDX-License-Identifier: Apache-2.0
"""Run configurations: presets are valid, and each mistake is told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disca.distill.config import (
    CfgStage,
    MeanFlowStage,
    PredictorStage,
    load_config,
    preset_names,
)
from disca.errors import UserError


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str, smoke: bool) -> None:
    config = load_config(name, smoke=smoke)
    assert load_config(config.model_dump(mode="json")) == config


def test_digits_preset_has_every_stage_in_order() -> None:
    config = load_config("digits")
    assert list(config.stages) == [
        "classifier",
        "teacher",
        "cfg",
        "meanflow",
        "rmeanflow",
        "predictor",
        "predictor_residual",
        "rmeanflow_r01",
        "rmeanflow_r04",
        "predictor_meanflow",
        "predictor_no_gan",
        "predictor_no_mse",
    ]
    plain, restricted = config.stages["meanflow"], config.stages["rmeanflow"]
    assert isinstance(plain, MeanFlowStage)
    assert isinstance(restricted, MeanFlowStage)
    assert (plain.restriction, restricted.restriction) == (1.0, 0.2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mse_steps": 5}, "leaves the GAN term alone"),
        ({"mse_steps": 0, "gan_weight": 0.0}, "leaves the GAN term alone"),
        ({"mse_weight": -1.0}, "mse_weight"),
    ],
)
def test_a_predictor_needs_something_to_learn_from(changes: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PredictorStage(**{"mse_weight": 0.0, **changes})


def test_defaults_follow_the_paper() -> None:
    predictor = PredictorStage()
    assert (predictor.mse_steps, predictor.steps) == (500, 1500)
    assert (predictor.optimizer.lr, predictor.discriminator.lr) == (1e-4, 1e-2)
    assert (predictor.gan_weight, predictor.delta, predictor.delta_max) == (1.0, "uniform", 0.2)
    assert (predictor.form, predictor.points) == ("paper", "line")
    assert CfgStage(steps=1).guidance == (1.0, 8.0)
    meanflow = MeanFlowStage(steps=1)
    assert (meanflow.velocity, meanflow.adaptive_power, meanflow.equal_fraction) == (
        "teacher",
        0.0,
        0.0,
    )
    assert meanflow.correction_clip is None
    assert meanflow.tangent_clip is None


def test_smoke_section_shrinks_every_stage() -> None:
    full, small = load_config("digits"), load_config("digits", smoke=True)
    assert small.model == full.model
    assert all(small.stages[n].steps <= 20 < full.stages[n].steps for n in full.stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, r"unknown key 'sede'; did you mean 'seed'\?"),
        ({"stages": {"teacher": {"stepz": 3}}}, r"stages\.teacher: .*did you mean 'steps'\?"),
        (
            {"stages": {"teacher": {"optimizer": {"lrr": 1}}}},
            r"stages\.teacher\.optimizer: .*did you mean 'lr'\?",
        ),
        (
            {"stages": {"rmeanflow": {"restriction": 1.2}}},
            r"stages\.rmeanflow\.restriction: .*1\.2",
        ),
        ({"stages": {"rmeanflow": {"restriction": 0}}}, r"stages\.rmeanflow\.restriction: "),
        ({"stages": {"rmeanflow": {"velocity": "tacher"}}}, r"'teacher' or 'data', got 'tacher'"),
        ({"stages": {"rmeanflow": {"tangent_width": -0.1}}}, r"tangent_width must be >= 0"),
        (
            {"stages": {"rmeanflow": {"teacher": "cgf"}}},
            r"teacher is 'cgf', .*did you mean 'cfg'\?",
        ),
        ({"stages": {"rmeanflow": {"kind": "meanfow"}}}, r"stages\.rmeanflow\.kind: .*'meanflow'"),
        ({"stages": {"teacher": {"steps": None}}}, r"stages\.teacher\.steps: .*integer"),
        ({"stages": {"teacher": {"init": "predictor"}}}, r"init is 'predictor'"),
        ({"stages": {"teacher": 5}}, r"stages\.teacher: "),
        ({"stages": {"predictor": {"schedule_lists": ["n9"]}}}, r"schedule_lists: .*'n9'"),
        ({"stages": {"predictor": {"schedule_lists": ["all"]}}}, r"'all' predicts no step"),
        ({"stages": {"predictor": {"schedule_lists": []}}}, r"at least one list"),
        ({"stages": {"predictor": {"host": "classifier"}}}, r"host is 'classifier'"),
        ({"stages": {"other": {"steps": 3}}}, r"stages\.other\.kind: needed"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as info:
        load_config("digits", changes=changes)
    assert "\n" not in str(info.value)
    assert str(info.value).startswith("preset digits: ")


def test_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'digitz'.*did you mean 'digits'\?"):
        load_config("digitz")


def test_file_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("stages: [unclosed")
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML") as info:
        load_config(path)
    assert "\n" not in str(info.value)
    path.write_text("- a list")
    with pytest.raises(UserError, match=r"run\.yaml: expected a mapping of settings, got list"):
        load_config(path)
    path.write_text(yaml.safe_dump(load_config("digits").model_dump(mode="json"), sort_keys=False))
    assert load_config(path) == load_config("digits")
    with pytest.raises(UserError, match="no 'smoke' section"):
        load_config(path, smoke=True)


def test_required_setting_is_named() -> None:
    with pytest.raises(UserError, match=r"stages\.teacher\.steps: this setting is required"):
        load_config({"data": {"kind": "digits"}, "model": {}, "stages": {"teacher": {}}})
