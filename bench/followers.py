"""Idle robots that follow the policy channel through the service; many in one process.

    python -m bench.followers --home runs/latency/robots --tokens tokens.json --url U --first 0 --count 16 --keys K

Each does what a robot does between two episodes: it asks for announcements, stages and verifies what it finds, loads
the policy, swaps. When that happened goes into `<home>/followed/<first>.jsonl`, as `{"robot", "version", "staged",
"active"}` in seconds since the epoch.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from pathlib import Path

from bench.oplog import OperationLog
from bench.route import parse_route, take_route
from infra.edge.inference import load_policy
from infra.edge.remote import RemoteServer
from infra.errors import LwdError
from infra.policy.keys import load_trusted
from infra.policy.subscriber import PolicySubscriber
from infra.process import log_to, process_arguments, run_process


def follow(number: int, options: argparse.Namespace, token: str, log: OperationLog, stop: threading.Event) -> None:
    """One robot, until `stop`."""
    robot = f"a{number}"
    server = RemoteServer(options.url, token, robot_id=robot)
    subscriber = PolicySubscriber(options.home / "policies" / robot, "learning", server, load_trusted(options.keys))
    rng, ready = random.Random(number), False
    stop.wait(rng.uniform(0, options.pause))
    while not stop.wait(options.pause * rng.uniform(0.9, 1.1)):
        try:
            subscriber.poll()
            if (candidate := subscriber.staged) is not None:
                staged = time.time()
                load_policy(candidate.bundle, version=candidate.version)
                subscriber.activate_at_boundary()
                log.write("active", robot=robot, version=candidate.version, staged=staged, active=time.time())
            if not ready:
                log.write("ready", robot=robot)
                ready = True
        except LwdError as error:
            log.write("trouble", robot=robot, problem=error.problem)
    server.close()


def _follow_all(options: argparse.Namespace, stop: threading.Event) -> None:
    take_route(options.route)
    log_to(options.home / "logs", f"followers-{options.first}")
    tokens = json.loads(options.tokens.read_text())
    log = OperationLog(options.home / "followed" / f"{options.first}.jsonl")
    threads = [
        threading.Thread(target=follow, args=(number, options, tokens[f"a{number}"], log, stop))
        for number in range(options.first, options.first + options.count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    parser = process_arguments("bench.followers", "Robots that only follow the policy channel.")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: robot -> token")
    parser.add_argument("--url", required=True, help="of the ingest service")
    parser.add_argument("--keys", type=Path, required=True, help="folder with the keys that robots trust")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.2, help="mean time between two looks of one robot, seconds")
    parser.add_argument("--route", type=parse_route, default={}, help="PORT=PORT,…: connect to another port instead")
    options = parser.parse_args()
    return run_process(options, lambda stop: _follow_all(options, stop), label="followers")


if __name__ == "__main__":
    sys.exit(main())
