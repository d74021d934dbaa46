"""Real ranks for tests: one process each, meeting at a store that this process keeps, as torchrun's agent would."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from lwd_model.ranks import Ranks

_context = get_context("forkserver")  # its server imports once; a fork of this process could inherit locked threads

Work = Callable[..., Any]


def preload(module: str) -> None:
    """Have the module whose functions are run imported once for all processes; call it when that is imported."""
    _context.set_forkserver_preload([module])


def ranks_store() -> dist.TCPStore:
    """A store for ranks, kept by this process."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started(
    work: Work, world: int, *arguments: Any, timeout_s: float = 30.0, absent: tuple[int, ...] = ()
) -> Iterator[dict[int, tuple[BaseProcess, Connection]]]:
    """Processes that run `work(ranks, *arguments)`, by rank; those still there at the end are killed."""
    store = ranks_store()
    running = {}
    for rank in set(range(world)) - set(absent):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_body, args=(there, work, rank, world, store.port, timeout_s, arguments))
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


def _body(pipe: Connection, work: Work, rank: int, world: int, port: int, timeout_s: float, arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        answer = work(Ranks(rank, world, store, timeout_s=timeout_s), *arguments)
    except Exception as error:
        traceback.print_exc()
        answer = error
    pipe.send(answer)
    pipe.close()
