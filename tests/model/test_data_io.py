# SPDX-License-Identifier: Apache-2.0
"""Writing clips: round trips, grids and refusals."""

import os
import stat

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from disca.data import MovingDigits
from disca.data.io import atomic_path, clip_grid, to_frames, write_clip
from disca.errors import UserError


def digits(n: int = 1) -> torch.Tensor:
    return MovingDigits().sample(n, torch.Generator().manual_seed(0)).clips


def colour_clip() -> torch.Tensor:
    """A smooth colour clip ``[3, 5, 15, 21]`` with far more than 256 colours, odd sides."""
    f, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (5, 15, 21)), indexing="ij")
    return torch.stack([x, y, (x + y + f) / 3])


def read_gif(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


def read_mp4(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_to_frames_levels_and_scale():
    clip = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    frames = to_frames(clip, scale=2)
    assert frames.shape == (1, 4, 4, 3)
    assert frames[0, ::2, ::2, 0].tolist() == [[0, 0], [128, 255]]
    assert (frames[0, :2, :2] == 0).all()
    assert (frames == frames[..., :1]).all()


def test_gif_is_exact_for_grey_clips(tmp_path):
    clip = digits()[0]
    write_clip(tmp_path / "a.gif", clip, fps=10, scale=3)
    assert (read_gif(tmp_path / "a.gif") == to_frames(clip, 3)).all()
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0


def test_gif_of_many_colours(tmp_path):
    write_clip(tmp_path / "a.gif", colour_clip())
    read = read_gif(tmp_path / "a.gif").astype(float)
    assert np.abs(read - to_frames(colour_clip())).mean() < 10


@pytest.mark.parametrize("fps", [8, 12.5])
def test_mp4(tmp_path, fps):
    write_clip(tmp_path / "new" / "a.mp4", colour_clip(), fps=fps, scale=3)
    read = read_mp4(tmp_path / "new" / "a.mp4")
    assert read.shape == (5, 46, 64, 3)
    assert np.abs(read[:, :45, :63].astype(float) - to_frames(colour_clip(), 3)).mean() < 4
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == fps


def test_grid_places_every_clip(tmp_path):
    clips = digits(6)
    rows = [("teacher", clips[:3]), ("a much longer name", clips[3:])]
    grid = clip_grid(rows, ["7 left fast", "1 up slow", "a prompt that is wide"], scale=1)
    assert grid.dtype == np.uint8
    assert grid.shape[0] == 8
    for clip in clips:
        want = to_frames(clip)[0]
        windows = np.lib.stride_tricks.sliding_window_view(grid[0], want.shape)[:, :, 0]
        assert (windows == want).all((2, 3, 4)).sum() == 1
    ink = (grid[0] < 100).all(-1)
    assert ink[:8].any(), "no column headings"
    assert ink[:, :30].any(), "no row names"
    write_clip(tmp_path / "grid.gif", grid)
    assert read_gif(tmp_path / "grid.gif").shape == grid.shape


def test_grid_refuses():
    clips = digits(2)
    with pytest.raises(UserError, match="at least one row"):
        clip_grid([], ["a"])
    with pytest.raises(UserError, match=r"row 'b' has clips of shape \[1, .*expected \[2, "):
        clip_grid([("a", clips), ("b", clips[:1])], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("a.webm", {}, "suffix must be .gif or .mp4"),
        ("a.gif", {"fps": 0}, "fps must be positive"),
        ("a.gif", {"scale": 0}, "scale must be at least 1"),
        ("a.gif", {"clip": torch.zeros(2, 3, 4, 4)}, r"1 or 3 channels, got shape \[2, 3, 4, 4\]"),
        ("a.gif", {"clip": torch.zeros(1, 0, 4, 4)}, "must be"),
        ("a.gif", {"clip": torch.full((1, 2, 4, 4), torch.nan)}, "not finite"),
    ],
)
def test_write_refuses(tmp_path, name, change, message):
    arguments = {"clip": torch.zeros(1, 2, 4, 4), **change}
    with pytest.raises(UserError, match=message):
        write_clip(tmp_path / name, **arguments)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"cannot write .*a\.gif"):
        write_clip(tmp_path / "file" / "a.gif", digits()[0])
    (tmp_path / "taken.gif").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_clip(tmp_path / "taken.gif", digits()[0])


def test_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4': Permission denied"):
        write_clip(tmp_path / "a.mp4", digits()[0])


def fail_halfway(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stop")


def test_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        fail_halfway(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
