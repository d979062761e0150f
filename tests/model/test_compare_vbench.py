# SPDX-License-Identifier: Apache-2.0
"""The export for VBench: names, prompts and command lines as its code reads them."""

import json
import os
import shlex

import av
import pytest
import torch

from disca.cli import main
from disca.compare.vbench import CUSTOM_DIMENSIONS, export_clips, export_comparison
from disca.errors import UserError
from tests.model.comparisons import FRAMES, SIZE, make_results, write_comparison

INFO = [
    {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a red car",
        "dimension": ["color"],
        "auxiliary_info": {"color": {"color": "red"}},
    },
    {"prompt_en": "a dog runs", "dimension": ["subject_consistency", "dynamic_degree"]},
]


def clips(n):
    return {"disca": torch.rand(n, 3, FRAMES, SIZE, SIZE) * 2 - 1}


def full_info(tmp_path, content=INFO):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def commands(script):
    lines = script.read_text().splitlines()
    return [shlex.split(line) for line in lines if line.startswith("vbench ")]


def test_custom_prompts(tmp_path):
    out = tmp_path / "out"
    prompts = ["a dog", "a cat/dog: 50%", "a dog"]
    done = export_clips(clips(3), prompts, out)
    names = ["a dog-0.mp4", "a cat_dog_ 50_-0.mp4", "a dog-1.mp4"]
    assert sorted(os.listdir(out / "videos/disca")) == sorted(names)
    assert json.loads((out / "prompts.json").read_text()) == dict(zip(names, prompts, strict=True))
    assert json.loads((out / "full_info.json").read_text()) == [
        {"prompt_en": prompt, "dimension": list(CUSTOM_DIMENSIONS)}
        for prompt in ("a dog", "a cat/dog: 50%")
    ]
    assert commands(done.script) == [
        ["vbench", "evaluate", "--videos_path", "videos/disca", "--dimension", dimension,
         "--mode", "custom_input", "--prompt_file", "prompts.json",
         "--output_path", "scores/disca"]
        for dimension in CUSTOM_DIMENSIONS
    ]  # fmt: skip
    assert os.access(done.script, os.X_OK)
    assert (done.methods, done.videos, done.missing) == (["disca"], 3, 0)


def test_videos_have_the_frames_the_speed_and_the_size(tmp_path):
    export_clips(clips(1), ["a dog"], tmp_path, fps=12, scale=3)
    with av.open(str(tmp_path / "videos/disca/a dog-0.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.frames, stream.average_rate) == (FRAMES, 12)
        assert (stream.width, stream.height) == (3 * SIZE, 3 * SIZE)


def test_standard_prompts(tmp_path):
    """VBench looks for PROMPT-INDEX.mp4, so prompts stay as they are."""
    path = full_info(tmp_path)
    out = tmp_path / "out"
    done = export_clips(clips(2), ["a red car", "a dog runs"], out, full_info=path)
    assert sorted(os.listdir(out / "videos/disca")) == ["a dog runs-0.mp4", "a red car-0.mp4"]
    assert json.loads((out / "full_info.json").read_text()) == INFO[1:]
    found = commands(done.script)
    assert [c[c.index("--dimension") + 1] for c in found] == [
        "color", "subject_consistency", "dynamic_degree",
    ]  # fmt: skip
    for command in found:
        assert command[command.index("--mode") + 1] == "vbench_standard"
        assert command[command.index("--full_json_dir") + 1] == str(path)
    # 25 of the lake, and 4 more of each of the other two
    assert done.missing == 25 + 4 + 4


def test_flickering_is_scored_on_still_videos(tmp_path):
    done = export_clips(clips(1), ["a still lake"], tmp_path, full_info=full_info(tmp_path))
    keep, score = commands(done.script)
    assert keep == [
        "vbench", "static_filter", "--videos_path", "videos/disca", "--result_path", "still/disca",
    ]  # fmt: skip
    assert score[:6] == [
        "vbench", "evaluate", "--videos_path", "still/disca/filtered_videos",
        "--dimension", "temporal_flickering",
    ]  # fmt: skip
    assert done.missing == 24 + 5 + 5


def test_long_prompts_share_no_name(tmp_path):
    prompts = ["ä" * 200 + "x", "ä" * 200 + "y"]
    export_clips(clips(2), prompts, tmp_path)
    found = json.loads((tmp_path / "prompts.json").read_text())
    assert list(found.values()) == prompts
    assert all(len(name.encode()) < 255 for name in found)
    info = full_info(
        tmp_path, [{"prompt_en": prompt, "dimension": ["color"]} for prompt in prompts]
    )
    with pytest.raises(UserError, match="cannot be a file name"):
        export_clips(clips(2), prompts, tmp_path, full_info=info)


def test_a_comparison(tmp_path):
    write_comparison(tmp_path / "run")
    done = export_comparison(tmp_path / "run", tmp_path / "out")
    assert sorted(done.methods) == ["cfg-10", "cfg-10-fora", "flow-4", "flow-4-reuse", "real"]
    for method in done.methods:
        folder = tmp_path / "out/videos" / method
        assert sorted(os.listdir(folder)) == ["3 up slow-0.mp4", "7 left fast-0.mp4"]


def test_a_comparison_without_prompts(tmp_path):
    results = make_results()
    settings = {**results.settings, "prompts": []}
    write_comparison(tmp_path / "run", results.model_copy(update={"settings": settings}))
    export_comparison(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out/prompts.json").read_text()) == {
        "clip-0.mp4": "",
        "clip-1.mp4": "",
    }


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match="'disca' has 2 clips for 1 prompts"):
        export_clips(clips(2), ["a dog"], tmp_path)
    with pytest.raises(UserError, match="no clips to export"):
        export_clips({}, ["a dog"], tmp_path)
    with pytest.raises(UserError, match=r"'a dog' is none of VBench's 3 prompts.*custom_input"):
        export_clips(clips(1), ["a dog"], tmp_path, full_info=full_info(tmp_path))
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        export_clips(clips(1), ["a dog"], tmp_path, full_info=tmp_path / "nowhere.json")
    for content in ("[", "[]", "[1]", '[{"prompt_en": "a dog"}]', "3"):
        with pytest.raises(UserError, match="does not hold VBench's prompts"):
            export_clips(clips(1), ["a dog"], tmp_path, full_info=full_info(tmp_path, content))
    with pytest.raises(UserError, match="holds no results"):
        export_comparison(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("fps", [0.0, -8.0, float("nan"), float("inf"), 1e12, 1e-4])
def test_a_bad_speed_leaves_no_folder(tmp_path, fps):
    with pytest.raises(UserError, match=r"fps must be from 0\.001 to 1000 frames a second, got"):
        export_clips(clips(1), ["a dog"], tmp_path / "out", fps=fps)
    assert not (tmp_path / "out").exists()


def test_clips_that_are_no_videos_leave_no_folder(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="scale must be at least 1, got 0"):
        export_clips(clips(1), ["a dog"], out, scale=0)
    # 8 pixels 2049 times as large are 16392, more than H.264's 16384
    with pytest.raises(UserError, match="would be 16392 pixels large at scale 2049"):
        export_clips(clips(1), ["a dog"], out, scale=2049)
    second = torch.full((1, 3, FRAMES, SIZE, SIZE), float("nan"))
    with pytest.raises(UserError, match="not finite"):
        export_clips(clips(1) | {"broken": second}, ["a dog"], out)
    assert not out.exists()


def test_another_number_of_clips_than_prompts(tmp_path):
    results = make_results()
    three = {row.key: torch.zeros(3, 1, FRAMES, SIZE, SIZE) for row in results.rows}
    write_comparison(tmp_path / "run", results, three)
    with pytest.raises(UserError, match="'cfg-10' has 3 clips for 2 prompts"):
        export_comparison(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_method_is_scored_on_videos_of_another(tmp_path):
    both = {"a/b": clips(1)["disca"], "a:b": clips(1)["disca"]}
    with pytest.raises(UserError, match="'a/b' and another method would both be 'a_b'"):
        export_clips(both, ["a dog"], tmp_path)
    export_clips(clips(2), ["a dog", "a dog"], tmp_path)
    export_clips(clips(2), ["a dog", "a dog"], tmp_path)  # again: the same files
    with pytest.raises(UserError, match="disca holds other files, which VBench would score too"):
        export_clips(clips(1), ["a dog"], tmp_path)


def test_the_command(tmp_path, capsys):
    write_comparison(tmp_path / "run")
    with pytest.raises(SystemExit) as exit_info:
        main(["export-vbench", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 0
    assert "2 videos of each of 5 methods" in capsys.readouterr().out
    assert (tmp_path / "out/evaluate.sh").is_file()
    other = tmp_path / "other"
    with pytest.raises(SystemExit) as exit_info:
        main(["export-vbench", str(tmp_path / "run"), "--out", str(other), "--fps", "-1"])
    assert exit_info.value.code not in (0, None)
    assert "fps must be from 0.001 to 1000 frames a second, got -1" in capsys.readouterr().err
    assert not other.exists()
