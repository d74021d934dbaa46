"""Idle robots that follow the policy channel through the service; many in one process.

    python -m bench.followers --home runs/latency/robots --tokens tokens.json --url U --first 0 --count 16 --keys K

Each does what a robot does between two episodes: it asks for announcements, stages and verifies what it finds, loads
the policy, swaps. When that happened goes into `<home>/followers/<first>.jsonl`, as `{"robot", "version", "staged",
"active"}` in seconds since the epoch.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from functools import partial
from pathlib import Path

from bench.oplog import OperationLog
from bench.robots import robot_arguments, robot_name, run_robots
from infra.edge.inference import load_policy
from infra.edge.remote import RemoteServer
from infra.errors import LwdError
from infra.policy.keys import load_trusted
from infra.policy.subscriber import PolicySubscriber
from infra.process import run_process

KIND = "followers"


def follow(
    options: argparse.Namespace, number: int, server: RemoteServer, log: OperationLog, stop: threading.Event
) -> None:
    """One robot, until `stop`."""
    robot = robot_name(number)
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


def main() -> int:
    parser = robot_arguments("bench.followers", "Robots that only follow the policy channel.")
    parser.add_argument("--keys", type=Path, required=True, help="folder with the keys that robots trust")
    parser.add_argument("--pause", type=float, default=0.2, help="mean time between two looks of one robot, seconds")
    options = parser.parse_args()
    return run_process(options, partial(run_robots, options, KIND, partial(follow, options)), label=KIND)


if __name__ == "__main__":
    sys.exit(main())
