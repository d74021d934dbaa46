"""A way round for a process's HTTP connections: what it sends to one local port goes to another, a shaped link, say.

The robot keeps the service's and the store's own addresses, so that presigned URLs stay what was signed, and other
processes are not slowed by the robots' link.
"""

from __future__ import annotations

import argparse
from typing import Any

from urllib3.util import connection


def parse_route(text: str) -> dict[int, int]:
    """`8787=9001,3900=9002` as {8787: 9001, 3900: 9002}."""
    try:
        return {int(port): int(by) for port, by in (pair.split("=") for pair in text.split(",") if pair)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not PORT=PORT,PORT=PORT") from None


def take_route(ports: dict[int, int]) -> None:
    """From now on, urllib3 connects to `ports[port]` where `port` is asked for; the request's Host stays."""
    direct = connection.create_connection

    def create_connection(address: tuple[str, int], *arguments: Any, **options: Any) -> Any:
        host, port = address
        return direct((host, ports.get(port, port)), *arguments, **options)

    connection.create_connection = create_connection
