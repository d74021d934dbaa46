"""How figures look: matplotlib SVG placed inline in the page, its colours bound to the page's CSS variables.

A figure is drawn once; light and dark themes differ in the variables only. Each colour below is a sentinel that
appears nowhere else, replaced in the SVG's text by `var(--name)`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
GREY, TEAL, ORANGE, RED, BLUE, VIOLET = "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a"

_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card", GREY: "--c-grey", TEAL: "--c-teal",
    ORANGE: "--c-orange", RED: "--c-red", BLUE: "--c-blue", VIOLET: "--c-violet",
}  # fmt: skip

METHOD_COLOURS = {"sft": GREY, "offline": TEAL, "online": ORANGE, "recap": BLUE, "hg_dagger": VIOLET}

_RC: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled(name: str) -> Iterator[None]:
    """Draw inside this; `name` makes the SVG's ids unique in the page and equal from run to run."""
    with plt.rc_context(_RC | {"svg.hashsalt": name}):
        yield


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an `<svg>` element for the page; closes the figure.

    Args:
        figure: drawn inside `styled(name)`.
        name: as given to `styled`.
        title: for readers that do not see the picture.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Ids are unique within a figure only; a page holds many.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\1{name}-\2", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([^;\"]*?)'?(?:DejaVu Sans|sans-serif)[^;\"]*", r"font: \1var(--font)", text)
    head = re.compile(r"<svg[^>]*>")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="0 0 {width} {height}" style="min-width:min(100%,{float(width) * 0.8:.0f}px)">'
        f"<title>{title}</title>"
    )
    return head.sub(lambda _: opening, text, count=1)
