# SPDX-License-Identifier: Apache-2.0
"""The command line: what works, and one line with exit code 2 for each way to get it wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from disca.cli import main
from disca.compare.plan import row_plan
from disca.data.source import build_source
from disca.distill.bundle import base_config, build_stage, write_config
from disca.distill.checkpoint import load_tensors, write_tensors
from disca.distill.config import load_config

RUN = {
    "data": {"kind": "digits", "frames": 4, "size": 16},
    "model": {
        "patch": [4, 8, 8],
        "hidden": 24,
        "heads": 1,
        "double_blocks": 1,
        "single_blocks": 1,
        "mlp_ratio": 2.0,
        "rope_dims": [8, 8, 8],
        "text_refiner_depth": 0,
        "time_features": 16,
    },
    "stages": {
        "classifier": {"steps": 1},
        "teacher": {"steps": 1},
        "cfg": {"steps": 1},
        "meanflow": {"steps": 1},
        "rmeanflow": {"kind": "meanflow", "steps": 1, "restriction": 0.2},
        "predictor": {"steps": 1, "form": "paper"},
        "predictor_residual": {"kind": "predictor", "steps": 1, "form": "residual"},
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of untrained weights in the layout of a finished run's export."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(RUN)
    source = build_source(config.data)
    torch.manual_seed(0)
    for name in config.stages:
        module = build_stage(base_config(config, source), config, name, source)
        tensors = module.state_dict()
        if "final_layer.linear.weight" in tensors:  # zero in a fresh model, as is its velocity
            torch.nn.init.normal_(tensors["final_layer.linear.weight"], std=0.2)
        write_tensors(folder / f"{name}.safetensors", tensors, {"stage": name})
    write_config(folder, config)
    return folder


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the run to damage, outside the folder that is watched for new files."""
    return shutil.copytree(checkpoints, tmp_path / "run")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def refuse(capsys, watched, match, *arguments):
    """The command must end with code 2 and one line, and leave the folder as it was."""
    before = sorted(watched.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("disca: error: ")
    assert err.count("\n") == 1
    assert match in err
    assert sorted(watched.rglob("*")) == before


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_env(capsys):
    code, out, err = run(capsys, "env")
    assert code == 0
    assert f"torch: {torch.__version__.partition('+')[0]}" in out
    for op in ("attention", "adaln_modulate", "timestep_features"):
        assert op in out
    assert err == ""


def test_help_is_quick():
    """Neither torch nor pydantic nor numpy is loaded to print the help."""
    code = (
        "import sys; sys.argv = ['disca', '--help']\n"
        "from disca.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("env", "train", "sample", "export", "compare", "ablate"):
        assert command in done.stdout


def test_module_entry(tmp_path):
    """The real process: code 2, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "disca.cli", "train", "--preset", "digits", "--config", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "--out" in done.stderr


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_sample_writes_a_clip(capsys, checkpoints, out, suffix):
    path = out / f"new/clips.{suffix}"
    prompts = ["--prompt", "7 left fast", "--prompt", "3 up slow"]
    code, text, err = run(
        capsys,
        *["sample", *prompts, "--checkpoints", checkpoints, "--out", path],
        *["--steps", 3, "--policy", "disca:full_steps=[0, 2]"],
    )
    assert (code, err) == (0, "")
    assert "2 clips, 2 full and 1 skipped steps" in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("model", "policy", "expected"),
    [
        ("teacher", "cfg", "2 full and 0 skipped"),
        ("cfg", "none", "2 full and 0 skipped"),
        ("meanflow", "none", "2 full and 0 skipped"),
        ("rmeanflow", "reuse:full_steps=[0]", "1 full and 1 skipped"),
        ("rmeanflow", "disca:full_steps=[0],predictor=predictor", "1 full and 1 skipped"),
        ("rmeanflow", "disca:full_steps=[0]", "1 full and 1 skipped"),
        ("cfg", "fora:interval=2", "1 full and 1 skipped"),
    ],
)
def test_sample_policies(capsys, checkpoints, out, model, policy, expected):
    code, text, _ = run(
        capsys,
        *["sample", "--prompt", "7 left fast", "--checkpoints", checkpoints, "--model", model],
        *["--policy", policy, "--steps", 2, "--out", out / "a.gif"],
    )
    assert code == 0
    assert expected in text
    with Image.open(out / "a.gif") as gif:
        assert gif.n_frames == 4


def test_sample_is_a_function_of_the_seed(capsys, checkpoints, out):
    contents = []
    for seed in (0, 0, 1):
        path = out / "a.gif"
        arguments = ["--policy", "none", "--steps", 1, "--seed", seed, "--out", path]
        run(capsys, "sample", "--prompt", "7 left fast", "--checkpoints", checkpoints, *arguments)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_compare_writes_files_and_docs(capsys, checkpoints, out):
    docs = out / "results.md"
    docs.write_text("# R\n<!-- begin compare -->\n<!-- end compare -->\nafter\n")
    code, text, _ = run(
        capsys,
        *["compare", "--checkpoints", checkpoints, "--out", out / "r", "--seeds", "3,5"],
        *["--clips", 4, "--docs", docs, "--guidance", 2.5],
        *["--model", "cfg", "--steps", 3, "--policy", "fora:interval=2"],
    )
    assert code == 0
    assert "Real clips" in text
    results = json.loads((out / "r" / "results.json").read_text())
    assert results["settings"]["seeds"] == [3, 5]
    assert results["settings"]["guidance"] == 2.5
    assert [row["key"] for row in results["rows"]] == [
        "cfg-3-none",
        row_plan(model="cfg", steps=3, policy="fora:interval=2").key,
    ]
    assert (out / "r" / "report.html").is_file()
    assert "| fora (interval 2) |" in docs.read_text()
    assert docs.read_text().endswith("<!-- end compare -->\nafter\n")


def test_compare_takes_a_plan(capsys, checkpoints, out):
    plan = out / "plan.yaml"
    plan.write_text(
        "title: T\nclips: 8\nreference_clips: 8\nrepeats: 1\nquick: {clips: 2}\n"
        "rows: [{model: cfg, steps: 2}]\n"
    )
    arguments = ["--checkpoints", checkpoints, "--out", out / "r", "--preset", plan, "--quick"]
    code, _, _ = run(capsys, "compare", *arguments, "--policy", "reuse:full_steps=[0]")
    assert code == 0
    results = json.loads((out / "r" / "results.json").read_text())
    assert results["settings"]["clips"] == 2
    assert [row["key"] for row in results["rows"]] == [
        "cfg-2-none",
        row_plan(model="rmeanflow", steps=20, policy="reuse:full_steps=[0]").key,
    ]


def test_export_writes_small_weights_that_sample_alike(capsys, checkpoints, out, tmp_path):
    run_folder = shutil.copytree(checkpoints, tmp_path / "run")
    (run_folder / "sampling.yaml").write_text("guidance: 2.5\n")
    code, text, _ = run(capsys, "export", "--checkpoints", run_folder, "--out", out / "small")
    assert code == 0
    assert "teacher: " in text
    names = {path.name for path in run_folder.iterdir()}
    assert {path.name for path in (out / "small").iterdir()} == names
    for path in sorted(run_folder.glob("*.safetensors")):
        exported = load_tensors(out / "small" / path.name).tensors
        for name, value in load_tensors(path).tensors.items():
            assert torch.equal(exported[name], value.half() if value.is_floating_point() else value)
    assert (out / "small" / "sampling.yaml").read_text() == "guidance: 2.5\n"


TRAIN = ["train", "--out", "OUT", "--preset", "digits"]
SAMPLE = ["sample", "--checkpoints", "RUN", "--prompt", "7 left fast", "--out", "OUT/a.gif"]
COMPARE = ["compare", "--checkpoints", "RUN", "--out", "OUT/r"]
FORA = [*COMPARE, "--policy", "fora:interval=3"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["trian"], "No such command 'trian'"),
        ([], "Missing command"),
        (["train"], "Missing option '--out'"),
        (["train", "--out", "OUT/r"], "either --preset NAME or --config FILE"),
        ([*TRAIN, "--config", "a.yaml"], "either --preset NAME or --config FILE"),
        (["train", "--out", "OUT/r", "--preset", "digit"], "did you mean 'digits'?"),
        (["train", "--out", "OUT/r", "--config", "OUT/none.yaml"], "no such configuration file"),
        (["train", "--out", "OUT/r", "--config", "OUT/run"], "takes a YAML file"),
        ([*TRAIN, "--set", "stages.teacher.stesp=3"], "did you mean 'steps'?"),
        ([*TRAIN, "--set", "stages.rmeanflow.restriction=1.5"], "got 1.5"),
        ([*TRAIN, "--set", "stages.rmeanflow.restriction=0"], "restriction"),
        ([*TRAIN, "--set", "seed"], "takes NAME.NAME=VALUE, got 'seed'"),
        ([*TRAIN, "--set", "a..b=1"], "takes NAME.NAME=VALUE"),
        ([*TRAIN, "--set", "seed=[1"], "cannot read the value '[1'"),
        ([*TRAIN, "--set", "seed=1", "--set", "seed.a=1"], "already has a value"),
        ([*TRAIN, "--stage", "tecaher"], "no stage 'tecaher'"),
        (["sample", "--out", "OUT/a.gif"], "Missing option '--prompt'"),
        ([*SAMPLE, "--prompt", "7 sideways fast"], "unknown word 'sideways'"),
        ([*SAMPLE, "--prompt", "left 7 fast"], "expected the form"),
        ([*SAMPLE, "--policy", "disca:full_steps=[1, 2]"], "must contain step 0"),
        ([*SAMPLE, "--policy", "disca:full_steps=[0, 20]"], "full step 20 is out of range"),
        ([*SAMPLE, "--policy", "disca:full_steps=n5"], "unknown step list 'n5'"),
        ([*SAMPLE, "--steps", "10"], "'n4' is for 20 steps, got 10"),
        ([*SAMPLE, "--policy", "disca:full_steps=all"], "would skip nothing"),
        ([*SAMPLE, "--policy", "disca"], "needs the setting 'full_steps'"),
        ([*SAMPLE, "--policy", "magic"], "unknown policy 'magic'"),
        ([*SAMPLE, "--policy", "cfg"], "CFG is already distilled into it"),
        ([*SAMPLE, "--steps", "0"], "steps: Input should be greater than or equal to 1, got 0"),
        ([*SAMPLE, "--steps", "few"], "'--steps'"),
        ([*SAMPLE, "--seed", "-1"], "--seed must be 0 or more"),
        ([*SAMPLE, "--seed", "99999999999999999999"], "--seed must be 0 or more"),
        ([*SAMPLE, "--policy", "fora:3=4"], "cannot read the policy 'fora:3=4'"),
        ([*SAMPLE, "--policy", "fora:interval=2,interval=3"], "the setting 'interval' twice"),
        ([*SAMPLE, "--model", "magic"], "no finished stage 'magic'"),
        ([*SAMPLE, "--shift", "0"], "sampling setting 'shift'"),
        ([*SAMPLE, "--guidance", "nan"], "sampling setting 'guidance'"),
        ([*SAMPLE, "--out", "OUT/a.png"], "must end in .gif or .mp4"),
        ([*SAMPLE, "--out", "OUT/file/a.gif"], "cannot write"),
        ([*SAMPLE, "--checkpoints", "OUT"], "holds no trained run"),
        (COMPARE, "nothing to compare: give --preset NAME"),
        ([*COMPARE, "--preset", "digit"], "did you mean 'digits'?"),
        ([*COMPARE, "--preset", "OUT/none.yaml"], "no such plan"),
        ([*FORA, "--quick"], "has no 'quick' section"),
        ([*FORA, "--seeds", "0,x"], "whole numbers separated by commas"),
        ([*FORA, "--seeds", "1,1"], "different numbers"),
        ([*FORA, "--clips", "0"], "clips: Input should be greater than or equal to 2"),
        ([*FORA, "--model", "magic"], "no finished stage 'magic'"),
        ([*FORA, "--docs", "OUT/file"], "needs the lines '<!-- begin compare -->'"),
        ([*FORA, "--docs", "OUT/none.md"], "cannot read"),
        ([*FORA, "--out", "OUT/file/r"], "cannot write to the folder"),
        ([*FORA, "--checkpoints", "OUT"], "holds no trained run"),
        ([*FORA, "--what"], "No such option"),
        (["export", *COMPARE[1:3], "--out", "OUT/file/r"], "cannot write to"),
        (["export", "--checkpoints", "OUT/none", "--out", "OUT/r"], "none"),
        (["ablate", "time-tangent", "--out", "OUT/r"], "Missing option '--checkpoints'"),
        (
            ["ablate", "time-tangent", "--out", "OUT/r", "--checkpoints", "OUT"],
            "holds no trained run",
        ),
        (
            ["ablate", "time-tangent", *COMPARE[1:], "--docs", "OUT/file"],
            "needs the lines '<!-- begin time-tangent -->'",
        ),
    ],
)
def test_bad_input(capsys, checkpoints, out, arguments, match):
    (out / "file").write_text("not a folder\n")
    filled = [a.replace("OUT", str(out)).replace("RUN", str(checkpoints)) for a in arguments]
    refuse(capsys, out, match, *filled)


def test_train_refuses_a_folder_it_cannot_write(capsys, out):
    (out / "file").write_text("")
    arguments = ["train", "--preset", "digits", "--smoke", "--out", out / "file" / "run"]
    refuse(capsys, out, "cannot write to the output folder", *arguments)


def test_train_refuses_a_video_that_is_none(capsys, out):
    video = out / "clip.mp4"
    video.write_bytes(b"this is no video" * 100)
    config = out / "video.yaml"
    config.write_text(
        f"data: {{kind: video, paths: ['{video}'], frames: 4, size: 16}}\n"
        "model: {patch: [4, 8, 8], hidden: 24, heads: 1, double_blocks: 1, single_blocks: 1,\n"
        "  rope_dims: [8, 8, 8], text_refiner_depth: 0}\n"
        "stages: {teacher: {steps: 1}}\n"
    )
    refuse(capsys, out, "clip.mp4", "train", "--config", config, "--out", out / "run")


@pytest.mark.parametrize("size", [0, 7, 2000])
def test_truncated_checkpoint(capsys, broken, out, size):
    weights = broken / "rmeanflow.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    arguments = ["--prompt", "7 left fast", "--out", out / "a.gif"]
    refuse(capsys, out, "rmeanflow.safetensors", "sample", "--checkpoints", broken, *arguments)


def test_checkpoint_of_another_shape(capsys, broken, out):
    weights = broken / "rmeanflow.safetensors"
    tensors = dict(load_tensors(weights).tensors)
    tensors["img_in.proj.weight"] = tensors["img_in.proj.weight"][1:]
    write_tensors(weights, tensors, {})
    arguments = ["--prompt", "7 left fast", "--out", out / "a.gif"]
    refuse(capsys, out, "'img_in.proj.weight'", "sample", "--checkpoints", broken, *arguments)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("guidnace: 3", "'guidnace'"),
        ("guidance: -1", "'guidance'"),
        ("form: other", "'form'"),
        ("predictor: [1]", "'predictor'"),
        ("- 1", "expected a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_sampling_file(capsys, broken, out, content, match):
    (broken / "sampling.yaml").write_text(content)
    arguments = ["--prompt", "7 left fast", "--out", out / "a.gif"]
    refuse(capsys, out, match, "sample", "--checkpoints", broken, *arguments)


def test_missing_stage(capsys, broken, out):
    (broken / "rmeanflow.safetensors").unlink()
    arguments = ["--prompt", "7 left fast", "--out", out / "a.gif"]
    refuse(
        capsys, out, "no finished stage 'rmeanflow'", "sample", "--checkpoints", broken, *arguments
    )


def test_debug_shows_the_traceback(capsys, out):
    code, _, err = run(
        capsys, "--debug", "compare", "--preset", "demo", "--checkpoints", out, "--out", out / "r"
    )
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("disca: error: ")


def test_a_defect_keeps_its_traceback(monkeypatch):
    from disca.compare import single

    def broken_sampler(**_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(single, "sample_clips", broken_sampler)
    with pytest.raises(ZeroDivisionError):
        main(["sample", "--prompt", "7 left fast", "--out", "a.gif"])
