# SPDX-License-Identifier: Apache-2.0
"""Write clips as GIF and MP4, alone or as a labelled grid. Files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from disca.errors import UserError

__all__ = ["atomic_path", "clip_grid", "to_frames", "write_clip"]

Frames = npt.NDArray[np.uint8]

_INK, _PAPER = 0, 255
_PAD = 4


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it into place when the block succeeds.

    When the block fails, the temporary file goes and what was at `path` before stays as it was.
    Missing folders are made.

    Raises:
        UserError: the folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {str(path)!r}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result has the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_frames(clip: Tensor, scale: int = 1) -> Frames:
    """A clip ``[C, F, H, W]`` in [-1, 1] as RGB frames uint8 ``[F, scale*H, scale*W, 3]``.

    Values outside [-1, 1] are clamped; one channel becomes grey; pixels are enlarged unsmoothed.

    Raises:
        UserError: not four dimensions, not 1 or 3 channels, no frames, or values not finite.
    """
    if clip.dim() != 4 or clip.shape[0] not in (1, 3) or 0 in clip.shape:
        raise UserError(
            f"a clip must be [C, F, H, W] with 1 or 3 channels, got shape {list(clip.shape)}"
        )
    if scale < 1:
        raise UserError(f"scale must be at least 1, got {scale}")
    values = clip.detach().float().cpu()
    if not torch.isfinite(values).all():
        raise UserError("a clip to write holds values that are not finite")
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    large = levels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rgb = large.expand(3, *large.shape[1:]).permute(1, 2, 3, 0)  # [F, H, W, 3]
    return np.ascontiguousarray(rgb.numpy())


def write_clip(
    path: str | Path, clip: Tensor | Frames, *, fps: float = 8.0, scale: int = 1
) -> None:
    """Write a clip as GIF or MP4, chosen by the suffix of `path`.

    GIF is lossless up to 256 colours; its frame times are multiples of 10 ms. MP4 is H.264, lossy,
    and padded to even sides.

    Args:
        path: ends in .gif or .mp4; missing folders are made.
        clip: a clip ``[C, F, H, W]`` in [-1, 1], or RGB frames uint8 ``[F, H, W, 3]`` such as
            `clip_grid` returns.
        fps: frames per second.
        scale: enlargement of a clip, in whole pixels; frames are written as they are.

    Raises:
        UserError: another suffix, a clip `to_frames` refuses, or a place that cannot be written.
    """
    path = Path(path)
    writers = {".gif": _write_gif, ".mp4": _write_mp4}
    if path.suffix.lower() not in writers:
        raise UserError(f"cannot write {str(path)!r}: the suffix must be .gif or .mp4")
    if not fps > 0:
        raise UserError(f"fps must be positive, got {fps}")
    frames = to_frames(clip, scale) if isinstance(clip, Tensor) else clip
    with atomic_path(path) as temporary:
        writers[path.suffix.lower()](temporary, frames, fps)


def clip_grid(
    rows: Sequence[tuple[str, Tensor]], columns: Sequence[str], *, scale: int = 4
) -> Frames:
    """Lay clips out as a table: a row for each method, a column for each prompt.

    Args:
        rows: name of the method and its clips ``[len(columns), C, F, H, W]``; all of one shape.
        columns: the prompts, written above.
        scale: enlargement in whole pixels, unsmoothed.

    Returns:
        RGB frames uint8 ``[F, height, width, 3]`` for `write_clip`.

    Raises:
        UserError: no rows or columns, or rows whose clips differ in shape or number.
    """
    if not rows or not columns:
        raise UserError("a grid of clips needs at least one row and one column")
    shape = rows[0][1].shape
    for name, clips in rows:
        if clips.shape != shape or len(clips) != len(columns):
            raise UserError(
                f"grid row {name!r} has clips of shape {list(clips.shape)}, expected "
                f"{[len(columns), *shape[1:]]}"
            )
    _, _, frames, height, width = shape
    font = ImageFont.load_default()
    text_height = 2 * _PAD + max(_text_size(font, text)[1] for text in (*columns, "Ag"))
    left = 2 * _PAD + max(_text_size(font, name)[0] for name, _ in rows)
    cell_width = max(width * scale, *(_text_size(font, text)[0] for text in columns)) + _PAD
    cell_height = max(height * scale, text_height) + _PAD
    size = (left + cell_width * len(columns), text_height + cell_height * len(rows))
    paper = _labels(
        size, font, [name for name, _ in rows], columns, (left, text_height), cell_height
    )
    grid = np.repeat(np.asarray(paper)[None], frames, 0)  # [F, height, width, 3]
    for i_row, (_, clips) in enumerate(rows):
        for i_column, clip in enumerate(clips):
            top, start = text_height + i_row * cell_height, left + i_column * cell_width
            grid[:, top : top + height * scale, start : start + width * scale] = to_frames(
                clip, scale
            )
    return grid


def _labels(
    size: tuple[int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    names: Sequence[str],
    columns: Sequence[str],
    corner: tuple[int, int],
    cell_height: int,
) -> Image.Image:
    """The empty table with its row names and column headings."""
    paper = Image.new("RGB", size, (_PAPER,) * 3)
    draw = ImageDraw.Draw(paper)
    left, top = corner
    cell_width = (size[0] - left) // len(columns)
    for i, text in enumerate(columns):
        draw.text((left + i * cell_width, _PAD), text, fill=(_INK,) * 3, font=font)
    for i, text in enumerate(names):
        y = top + i * cell_height + (cell_height - _PAD - _text_size(font, text)[1]) // 2
        draw.text((_PAD, y), text, fill=(_INK,) * 3, font=font)
    return paper


def _text_size(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    _, _, right, bottom = font.getbbox(text)
    return round(right), round(bottom)


def _write_gif(path: Path, frames: Frames, fps: float) -> None:
    indices, palette = _palette(frames)
    images = [Image.fromarray(frame) for frame in indices]
    for image in images:
        image.putpalette(palette)
    duration = max(20, round(100 / fps) * 10)  # browsers slow frames shorter than 20 ms down
    images[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=duration,
        loop=0,
        optimize=False,
    )


def _palette(frames: Frames) -> tuple[Frames, bytes]:
    """Indices ``[F, H, W]`` into one palette for all frames: a still background never flickers."""
    packed = frames.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)  # [F, H, W]
    colours, inverse = np.unique(packed, return_inverse=True)
    if len(colours) <= 256:
        channels = np.stack([colours >> 16, colours >> 8, colours], 1).astype(np.uint8)
        return inverse.reshape(packed.shape).astype(np.uint8), channels.tobytes()
    stacked = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    reduced = stacked.quantize(256, dither=Image.Dither.NONE)
    return np.asarray(reduced).reshape(frames.shape[:3]), bytes(reduced.getpalette() or ())


def _write_mp4(path: Path, frames: Frames, fps: float) -> None:
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = even.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the only layout that every player takes
        stream.options = {"crf": "10"}
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
