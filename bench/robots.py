"""What simulated robots have in common: many in one process, each with its token, thread and way to the servers.

The way may lead round: what a process sends to one local port goes to another, a shaped link, say. Its robots keep the
service's and the store's own addresses, so that presigned URLs stay what was signed, and other processes are not slowed
by the robots' link.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from urllib3.util import connection

from bench.oplog import OperationLog
from infra.edge.remote import RemoteServer
from infra.process import log_to, process_arguments

Life = Callable[[int, RemoteServer, OperationLog, threading.Event], object]
"""What a robot does: its number, its server, the log of its process, and the event that ends it."""


def robot_arguments(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with what a process of robots is told."""
    parser = process_arguments(module, description)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: robot -> token")
    parser.add_argument("--url", required=True, help="of the ingest service")
    parser.add_argument("--first", type=int, default=0, help="number of the first robot")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--route", type=parse_route, default={}, help="PORT=PORT,…: connect to another port instead")
    return parser


def robot_name(number: int) -> str:
    """Its id in the fleet."""
    return f"a{number}"


def run_robots(options: argparse.Namespace, name: str, life: Life, stop: threading.Event) -> bool:
    """Live every robot's life; whether all came to their end. One that fails does not end the others.

    Args:
        options: from a parser of `robot_arguments`.
        name: what they are; of the process's log, and of the folder in `home` for its operations log.
    """
    _take_route(options.route)
    log_to(options.home / "logs", f"{name}-{options.first}")
    tokens = json.loads(options.tokens.read_text())
    operations = OperationLog(options.home / name / f"{options.first}.jsonl")
    ended: list[int] = []

    def run(number: int) -> None:
        robot = robot_name(number)
        try:
            with closing(RemoteServer(options.url, tokens[robot], robot_id=robot)) as server:
                life(number, server, operations, stop)
            ended.append(number)
        except BaseException:
            logging.getLogger(__name__).exception("%s failed", robot)

    numbers = range(options.first, options.first + options.count)
    threads = [threading.Thread(target=run, args=(number,), name=robot_name(number)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(ended) == len(threads)


def parse_route(text: str) -> dict[int, int]:
    """`8787=9001,3900=9002` as {8787: 9001, 3900: 9002}."""
    try:
        return {int(port): int(by) for port, by in (pair.split("=") for pair in text.split(",") if pair)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not PORT=PORT,PORT=PORT") from None


def _take_route(ports: dict[int, int]) -> None:
    """From now on, urllib3 connects to `ports[port]` where `port` is asked for; the request's Host stays."""
    direct = connection.create_connection

    def create_connection(address: tuple[str, int], *arguments: Any, **options: Any) -> Any:
        host, port = address
        return direct((host, ports.get(port, port)), *arguments, **options)

    connection.create_connection = create_connection
