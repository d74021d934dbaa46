"""What a person sees: lines, tables, live bars on a terminal, one line in ten percent elsewhere.

Texts may come from anywhere: a robot's id, a reason, a record of the log. None of them is read as markup, and
characters that command a terminal are shown, not sent. Emphasis is said in code: `say(bold("PASS"), f" for {name}")`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from infra.errors import escaped

_UNWRAPPED = 10_000  # columns where no person looks: a digest is found by another program on one line


class PlainConsole(Console):
    """A console that takes every string literally."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, file=file, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = _UNWRAPPED

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options | {"markup": False, "emoji": False})


console = PlainConsole(stderr=True)  # progress and errors
out = PlainConsole()  # answers


def visible(text: str) -> str:
    """The text, of one line or several, with escapes for what commands a terminal."""
    return escaped(text, keep="\n\t")


def bold(text: object) -> Text:
    """In bold type."""
    return Text(visible(str(text)), "bold")


def green(text: object) -> Text:
    """As good news."""
    return Text(visible(str(text)), "green")


def yellow(text: object) -> Text:
    """As a warning."""
    return Text(visible(str(text)), "yellow")


def red(text: object) -> Text:
    """As an error."""
    return Text(visible(str(text)), "red")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")` for a piece of work of `total` parts."""
    started = time.monotonic()
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(visible(title), total=total, note="")
            yield lambda n=1, note="": bars.update(task, advance=n, note=visible(note))
        return
    done = 0
    shown = -1

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += n
        tenth = 10 * done // max(total, 1)
        if tenth != shown:
            shown = tenth
            console.print(f"{title:<28} {done}/{total}  {time.monotonic() - started:5.0f} s  {note}".rstrip())

    yield advance


def say(*parts: str | Text) -> None:
    """One line for the person who watches; its parts follow each other without a space."""
    console.print(*parts, sep="")
