# SPDX-License-Identifier: Apache-2.0
"""Decode video files to small uint8 frames and find their shots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from disca.errors import UserError
from disca.files import file_digest

__all__ = ["VIDEO_SUFFIXES", "DecodedVideo", "decode_video", "list_videos", "shots"]

VIDEO_SUFFIXES = (
    *(".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv", ".y4m"),
)

_PACKAGE = "package:"


@dataclass(frozen=True)
class DecodedVideo:
    """The frames of one file at working resolution.

    Attributes:
        path: the file.
        sha256: digest of the file's bytes.
        frames: uint8 ``[T, C, S, S]``.
        rate: frames per second, 0.0 where the file does not say.
    """

    path: Path
    sha256: str
    frames: Tensor
    rate: float


def list_videos(path: str | Path) -> list[Path]:
    """The file `path` itself, or the video files directly in folder `path`, by suffix and sorted.

    ``package:NAME/REST`` is REST in the folder of the installed Python package NAME, which is found
    but not imported, so that a configuration can name files that come with a wheel.

    Raises:
        UserError: nothing is there, the package is not installed, or the folder cannot be read or
            holds no video file.
    """
    folder = _in_package(str(path)) if str(path).startswith(_PACKAGE) else Path(path)
    if not folder.exists():
        raise UserError(f"video folder or file {str(folder)!r} does not exist")
    if not folder.is_dir():
        return [folder]
    try:
        found = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()
        )
    except OSError as error:
        raise UserError(f"video folder {str(folder)!r} cannot be read: {error.strerror}") from error
    if not found:
        raise UserError(
            f"no video file in {str(folder)!r}; looked for the suffixes {' '.join(VIDEO_SUFFIXES)}"
        )
    return found


def _in_package(path: str) -> Path:
    """Find ``package:NAME/REST``."""
    name, _, rest = path.removeprefix(_PACKAGE).partition("/")
    if not name.isidentifier() or not rest:
        raise UserError(
            f"{path!r} must read 'package:NAME/PATH': an importable package, then a path inside it"
        )
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{path!r} lies in the package {name!r}, which is not installed; install it, or set "
            "the paths of the data to your own video files"
        )
    return Path(spec.submodule_search_locations[0]) / rest


def decode_video(path: str | Path, size: int, channels: int) -> DecodedVideo:
    """Decode a whole file, cropped to the centre square and scaled to `size` by area averaging.

    Decoded files stay in memory (at the small size) and are reused while the file is unchanged.

    Args:
        path: any container and codec that FFmpeg reads.
        size: side of the square frames.
        channels: 3 for RGB, 1 for luma.

    Raises:
        UserError: the file is missing, unreadable, not a video, broken or without frames.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"video file {str(path)!r} does not exist")
    if not path.is_file():
        raise UserError(f"video file {str(path)!r} is not a file")
    try:
        status = path.stat()
        return _decode(path.resolve(), status.st_mtime_ns, status.st_size, size, channels)
    except OSError as error:
        raise UserError(f"video file {str(path)!r} cannot be read: {error.strerror}") from error


def shots(frames: Tensor, threshold: float | None) -> list[tuple[int, int]]:
    """Split frames ``[T, C, S, S]`` where the picture jumps.

    A cut lies between two frames whose mean absolute difference, as a share of full scale, exceeds
    `threshold`; None finds no cuts.

    Returns:
        Half-open frame ranges in order that cover all T frames.
    """
    total = len(frames)
    cuts: list[int] = []
    if threshold is not None and total > 1:
        values = frames.flatten(1).float()
        jump = (values[1:] - values[:-1]).abs().mean(1) / 255.0
        cuts = ((jump > threshold).nonzero().flatten() + 1).tolist()
    return list(zip([0, *cuts], [*cuts, total], strict=True))


@lru_cache(maxsize=256)
def _decode(path: Path, mtime_ns: int, length: int, size: int, channels: int) -> DecodedVideo:
    """`decode_video` behind a cache; time and length are there only to notice a changed file."""
    digest = file_digest(path)
    frames: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            # FFmpeg "plays" text files as terminal art; nobody wants that.
            if not container.streams.video or container.format.name == "tty":
                raise UserError(f"{str(path)!r} is not a video: it has no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0)
            frames.extend(_square(frame, size, channels) for frame in container.decode(stream))
    except av.FFmpegError as error:
        if frames:
            raise UserError(
                f"video file {str(path)!r} is broken: decoding stops after {len(frames)} frames "
                f"({error.strerror})"
            ) from error
        raise UserError(
            f"{str(path)!r} is not a video that can be decoded ({error.strerror})"
        ) from error
    if not frames:
        raise UserError(f"video file {str(path)!r} has no frames")
    return DecodedVideo(path, digest, torch.stack(frames), rate)


def _square(frame: av.VideoFrame, size: int, channels: int) -> Tensor:
    """One frame as uint8 ``[C, size, size]``."""
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24" if channels == 3 else "gray"))
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side].reshape(side, side, channels)
    square = square.permute(2, 0, 1).unsqueeze(0).float()  # [1, C, side, side]
    # Averaging areas does not alias. FFmpeg's own scaler is faster, but its area filter is off by
    # 8 grey levels on average when 720 lines shrink to 32.
    if side >= size:
        small = F.interpolate(square, size=(size, size), mode="area")
    else:
        small = F.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)
    return small[0].round().to(torch.uint8)
