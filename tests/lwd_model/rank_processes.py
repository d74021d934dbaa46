"""Real ranks for tests: one process each, meeting at a store that this process keeps, as torchrun's agent would."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist

from lwd_model.ranks import Ranks

# A fork of this process would inherit locks that threads of other tests hold, and a rank could wait for ever. What
# forks instead has one thread, and has imported once what takes longer than the tests.
_context = get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "lwd_model.learner"])
_TOGETHER = timedelta(seconds=120)

Work = Callable[..., Any]


def ranks_store() -> dist.TCPStore:
    """A store for ranks, kept by this process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started(
    work: Work, world: int, *arguments: Any, timeout_s: float = 30.0, absent: tuple[int, ...] = ()
) -> Iterator[dict[int, tuple[BaseProcess, Connection]]]:
    """Processes that run `work(ranks, *arguments)`, by rank; those still there at the end are killed."""
    store = ranks_store()
    running: dict[int, tuple[BaseProcess, Connection]] = {}
    present = sorted(set(range(world)) - set(absent))
    for rank in present:
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_body, args=(there, work, rank, present, world, store.port, timeout_s, arguments)
        )
        process.start()
        there.close()
        running[rank] = process, here
    try:
        yield running
    finally:
        for process, here in running.values():
            process.kill()
            process.join()
            here.close()


def result(pipe: Connection) -> Any:
    """What one rank returned, or the exception that it ended with; None where it was killed."""
    assert pipe.poll(240), "the rank neither answers nor ends"
    try:
        return pipe.recv()
    except EOFError:
        return None


def together(work: Work, world: int, *arguments: Any, **options: Any) -> list[Any]:
    """The results of all ranks, by rank."""
    with started(work, world, *arguments, **options) as running:
        return [result(pipe) for _, (_, pipe) in sorted(running.items())]


def _body(
    pipe: Connection,
    work: Work,
    rank: int,
    present: list[int],
    world: int,
    port: int,
    timeout_s: float,
    arguments: tuple[Any, ...],
) -> None:
    answer: Any = None
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        store.set(f"started/{rank}", "")  # how long this machine takes to start processes is not what is tested
        store.wait([f"started/{other}" for other in present], _TOGETHER)
        answer = work(Ranks(rank, world, store, timeout_s=timeout_s), *arguments)
    except Exception as error:
        traceback.print_exc()
        answer = error
    pipe.send(answer)
    pipe.close()
    sys.stderr.flush()
    os._exit(0)  # what this process has inherited is its parent's to close
