"""Camera frames as data URIs: a filmstrip for every reader, and a short animation where motion is welcome."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from flows.report.data import Frames


def filmstrip(clip: Frames, shown: int = 8) -> str:
    """`shown` frames evenly over the clip, side by side, as one WebP data URI."""
    chosen = clip.frames[_even(len(clip.frames), shown)]
    n, height, width, _ = chosen.shape
    gap = max(1, width // 64)
    strip = np.full((height, n * width + (n - 1) * gap, 4), 0, np.uint8)  # gaps are transparent: any theme
    for i, frame in enumerate(chosen):
        begin = i * (width + gap)
        strip[:, begin : begin + width, :3] = frame
        strip[:, begin : begin + width, 3] = 255
    return _webp([Image.fromarray(strip, "RGBA")])


def animation(clip: Frames, most: int = 60) -> str:
    """The clip as an animated WebP data URI, at most `most` frames, in its own time, pausing on the last."""
    index = _even(len(clip.frames), most)
    images = [Image.fromarray(clip.frames[i]) for i in index]
    step = 1000 / clip.fps * len(clip.frames) / len(index)
    return _webp(images, [round(step)] * (len(images) - 1) + [1200])


def still(clip: Frames) -> str:
    """The last frame."""
    return _webp([Image.fromarray(clip.frames[-1])])


def _even(n: int, shown: int) -> npt.NDArray[np.intp]:
    return np.unique(np.linspace(0, n - 1, min(n, shown)).round().astype(np.intp))


def _webp(images: list[Image.Image], durations: list[int] | None = None) -> str:
    buffer = io.BytesIO()
    extra = {"duration": durations, "loop": 0} if durations and len(images) > 1 else {}
    images[0].save(buffer, "WEBP", save_all=len(images) > 1, append_images=images[1:], quality=80, method=4, **extra)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
