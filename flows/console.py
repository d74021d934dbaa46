"""What a person sees while work goes on: live bars on a terminal, one line in ten percent elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")` for a piece of work of `total` parts."""
    started = time.monotonic()
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total, note="")
            yield lambda n=1, note="": bars.update(task, advance=n, note=note)
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


def say(message: str) -> None:
    """One line for the person who watches."""
    console.print(message)
