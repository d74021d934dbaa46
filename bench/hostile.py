"""Hostile robots: valid tokens, and everything but what a robot should do with them, in a loop.

    python -m bench.hostile --home runs/soak/robots --tokens tokens.json --url U --first 0 --count 2

Robot `h0`, `h1`, … picks one misdeed after another by its seed: odd episodes handed in by the book, bodies that lie
about their length, silence, guessed tokens, abused permits, nonsense. It ends with SIGTERM, or by a file in its home.
"""

from __future__ import annotations

import io
import json
import logging
import random
import socket
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import sqlalchemy as sa

from bench.actors import made
from bench.oplog import OperationLog
from bench.robots import robot_arguments
from infra.catalog import Catalog
from infra.catalog.schema import episodes, quarantine, snapshot_episodes, snapshots
from infra.edge.remote import RemoteServer
from infra.edge.server import Upload
from infra.episode import Episode, encode
from infra.errors import LwdError
from infra.process import log_to, run_process

KIND = "hostile"
ENOUGH = "enough-hostile"  # a file in the home that ends it
_PAUSE_S = 0.2  # mean, between two misdeeds of one robot
_TIMEOUT_S = 5.0
_SILENT = 60


def hostile_name(number: int) -> str:
    """Its id in the fleet."""
    return f"h{number}"


# --- odd episodes -----------------------------------------------------------------------------------------------------


def _changed(episode: Episode, **members: bytes) -> bytes:
    """The episode's tar, with members (by the part of the name after the first dot, `_` for `.`) of other bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(encode(episode))) as tar, tarfile.open(fileobj=out, mode="w") as made_tar:
        for member in tar:
            source = tar.extractfile(member)
            suffix = member.name.partition(".")[2].replace(".", "_")
            data = members.get(suffix, source.read() if source is not None else b"")
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            made_tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def odd_episode(rng: random.Random, robot: str) -> tuple[str, bytes]:
    """An id, and the bytes of an episode that no contract expects, or of none at all."""
    episode = made(np.random.default_rng(rng.getrandbits(32)), robot)
    steps, meta = len(episode.actions), episode.meta()

    def with_meta(**fields: object) -> Callable[[], bytes]:
        return lambda: _changed(episode, meta_json=json.dumps({**meta, **fields}).encode())

    kinds: list[Callable[[], bytes]] = [
        lambda: _changed(episode, actions_npy=_npy(np.zeros((), np.float32))),
        lambda: _changed(episode, actions_npy=_npy(np.zeros((0,), np.float32))),
        lambda: _changed(episode, actions_npy=_npy(np.zeros((steps, 5, 5, 1), np.float32))),
        lambda: _changed(episode, actions_npy=_npy(np.zeros((steps, 5), np.complex128))),
        lambda: _changed(episode, observations_npy=_npy(np.zeros((steps + 1, 84), np.float32))),
        lambda: _changed(episode, observations_npy=_npy(np.full((steps + 1, 7), np.nan, np.float32))),
        lambda: _changed(episode, observations_npy=b"\x93NUMPY\x01\x00" + rng.randbytes(200)),
        lambda: _changed(episode, meta_json=rng.choice([b"[]", b"7", b"{", b"[" * 50_000, b"null", b"\xff"])),
        with_meta(policy_version=2**40),
        with_meta(extra={"x": ["y" * 1000] * 2000}),
        with_meta(robot_id="r" * 100_000),
        with_meta(task=["S1"], instruction=7, outcome={}),
        lambda: encode(episode)[: rng.randrange(10_000)],
        lambda: rng.randbytes(rng.randrange(1, 50_000)),
        lambda: _pax(rng),
    ]
    return episode.episode_id, rng.choice(kinds)()


def _pax(rng: random.Random) -> bytes:
    """A tar whose first member is a large extension header."""
    record = b"%d path=" % 100_000 + b"9 a=b\n" * rng.randrange(1000, 30_000)
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    padding = b"\0" * (-len(record) % 512)
    return info.tobuf(tarfile.USTAR_FORMAT) + record + padding + b"\0" * 1024


# --- misdeeds ---------------------------------------------------------------------------------------------------------


class Hostile:
    """One hostile robot.

    Args:
        url: of the service. token: its own, valid. seed: of what it does.
    """

    def __init__(self, robot: str, url: str, token: str, server: RemoteServer, seed: int) -> None:
        self._robot, self._token, self._server = robot, token, server
        parts = urlsplit(url)
        self._place = (parts.hostname or "", parts.port or 80)
        self._rng = random.Random(f"{robot}-{seed}")

    def misdeeds(self) -> dict[str, Callable[[threading.Event], None]]:
        """All that it does, by name."""
        return {
            "odd_episode": self._odd_episode,
            "lying_length": self._lying_length,
            "oversize": self._oversize,
            "silent": self._silent,
            "dripping": self._dripping,
            "deaf": self._deaf,
            "guesses": self._guesses,
            "permits": self._permits,
            "nonsense": self._nonsense,
        }

    def live(self, log: OperationLog, stop: threading.Event, only: Sequence[str] = ()) -> None:
        """One misdeed after another, of those named, or of all."""
        deeds = {name: deed for name, deed in self.misdeeds().items() if not only or name in only}
        while not stop.wait(self._rng.expovariate(1 / _PAUSE_S)):
            name = self._rng.choice(list(deeds))
            try:
                deeds[name](stop)
            except (LwdError, OSError) as error:
                log.write("told", robot=self._robot, deed=name, problem=str(error)[:200])
            else:
                log.write("done", robot=self._robot, deed=name)

    def _odd_episode(self, stop: threading.Event) -> None:
        episode_id, data = odd_episode(self._rng, self._robot)
        self._server.submit(Upload(episode_id, sha256(data).hexdigest(), len(data), data))

    def _lying_length(self, stop: threading.Event) -> None:
        both = ["Content-Length: 10", "Transfer-Encoding: chunked"]
        lengths = ["10", "+10", "-1", "0x10", "10, 10", "9" * 30]
        lines = self._rng.choice([both, *([f"Content-Length: {length}"] for length in lengths)])
        self._flood("POST", "/v1/uploads", lines, own=self._rng.random() < 0.5)

    def _oversize(self, stop: threading.Event) -> None:
        key = f"incoming/{self._robot}/{'0' * 32}-{'0' * 8}.tar"
        self._flood("PUT", f"/v1/objects/{key}", [f"Content-Length: {self._rng.choice([100, 2**30])}"], own=True)

    def _silent(self, stop: threading.Event) -> None:
        say = self._rng.choice(
            [b"", b"GET /healthz HT", self._head("POST", "/v1/uploads", ["Content-Length: 9"], True)]
        )
        with ExitStack() as held:
            for _ in range(_SILENT):
                sock = held.enter_context(self._connect())
                with suppress(OSError):
                    sock.sendall(say)
            stop.wait(self._rng.uniform(0, 3))

    def _dripping(self, stop: threading.Event) -> None:
        with self._connect() as sock:
            sock.sendall(self._head("POST", "/v1/heartbeat", ["Content-Length: 1000"], True))
            for _ in range(20):
                sock.sendall(b" ")
                if stop.wait(0.1):
                    return

    def _deaf(self, stop: threading.Event) -> None:
        with self._connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(self._head("GET", "/openapi.json", [], False) * 50)
            stop.wait(1.0)

    def _guesses(self, stop: threading.Event) -> None:
        for _ in range(20):
            guess = f"{self._rng.getrandbits(64):016x}." + "A" * 43
            self._say(self._head("GET", "/v1/announcements", [f"Authorization: Bearer {guess}"], False))

    def _permits(self, stop: threading.Event) -> None:
        named = [
            {"episode_id": f"{self._rng.getrandbits(128):032x}", "sha256": "0" * 64, "size": 2**20} for _ in range(64)
        ]
        for _ in range(5):
            self._post("/v1/uploads", json.dumps({"episodes": named}).encode())

    def _nonsense(self, stop: threading.Event) -> None:
        path = "/v1/" + self._rng.choice(["uploads", "episodes", "episodes/status", "heartbeat", "measurements"])
        items: list[bytes] = [
            b"[" * 50_000, b'{"episodes": 1e400}', b'{"episodes": [{"episode_id": "\\u0000"}]}', b"\xff\xfe",
            b'{"episodes": 9223372036854775808}', b'{"episodes": "\\ud800"}', self._rng.randbytes(1000), b"null",
        ]  # fmt: skip
        self._post(path, self._rng.choice(items))

    # Bytes on sockets

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._place, timeout=_TIMEOUT_S)

    def _head(self, method: str, path: str, lines: list[str], own: bool) -> bytes:
        token = [f"Authorization: Bearer {self._token}"] if own else []
        return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *token, *lines, "", ""]).encode()

    def _post(self, path: str, body: bytes) -> None:
        lines = [f"Content-Length: {len(body)}", "Content-Type: application/json", "Connection: close"]
        self._say(self._head("POST", path, lines, True) + body)

    def _say(self, data: bytes) -> None:
        with self._connect() as sock:
            sock.sendall(data)
            sock.recv(2**12)

    def _flood(self, method: str, path: str, lines: list[str], own: bool) -> None:
        with self._connect() as sock:
            sock.sendall(self._head(method, path, lines, own))
            for _ in range(64):
                sock.sendall(bytes(2**18))


# --- what it did to the others ----------------------------------------------------------------------------------------


def honest(catalog: Catalog, since: float) -> dict[str, Any]:
    """How honest robots fared before and after the hostile ones began, at `since` (seconds since the epoch).

    `without` and `with`: episodes, and quantiles of the seconds from closing to snapshot; `unaccounted`: those that are
    neither in a snapshot nor refused.
    """
    mine = ~episodes.c.robot_id.startswith("h")
    held = sa.exists().where(quarantine.c.episode_id == episodes.c.episode_id, quarantine.c.sha256 == episodes.c.sha256)
    member = sa.exists().where(snapshot_episodes.c.episode_id == episodes.c.episode_id)
    query = (
        sa.select(episodes.c.produced_at, snapshots.c.created_at)
        .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
        .join(snapshots, snapshots.c.version == snapshot_episodes.c.added)
        .where(mine)
    )
    with catalog.read() as connection:
        rows = [(row.produced_at, row.created_at - row.produced_at) for row in connection.execute(query)]
        open_ones = sa.select(sa.func.count()).select_from(episodes).where(mine, ~held, ~member)
        unaccounted = int(connection.execute(open_ones).scalar_one())
    parts = {"without": [s for at, s in rows if at < since], "with": [s for at, s in rows if at >= since]}
    found: dict[str, Any] = {
        name: {"episodes": len(s), "p50": _quantile(s, 0.5), "p99": _quantile(s, 0.99)} for name, s in parts.items()
    }
    return {**found, "unaccounted": unaccounted}


def _quantile(seconds: list[float], share: float) -> float:
    return round(float(np.quantile(seconds, share)), 3) if seconds else 0.0


def _live_all(options: Any, stop: threading.Event) -> None:
    log_to(options.home / "logs", KIND)
    tokens = json.loads(options.tokens.read_text())
    log = OperationLog(options.home / KIND / f"{options.first}.jsonl")

    def live(number: int) -> None:
        robot = hostile_name(number)
        with closing(RemoteServer(options.url, tokens[robot], robot_id=robot, timeout_s=_TIMEOUT_S)) as server:
            hostile = Hostile(robot, options.url, tokens[robot], server, options.seed)
            while not stop.is_set():
                try:
                    hostile.live(log, stop, options.only)
                except Exception:
                    logging.getLogger(__name__).exception("%s goes on", robot)
                    time.sleep(1.0)

    numbers = range(options.first, options.first + options.count)
    threads = [threading.Thread(target=live, args=(number,), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    while not stop.wait(0.2) and not (options.home / ENOUGH).exists():
        pass
    stop.set()
    for thread in threads:
        thread.join(_TIMEOUT_S)


def main() -> int:
    parser = robot_arguments("bench.hostile", "Robots that mean harm.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="misdeeds; all if not given")
    options = parser.parse_args()
    return run_process(options, partial(_live_all, options), label=KIND)


if __name__ == "__main__":
    sys.exit(main())
