"""One robot as a process: `python -m infra.fleet.robot --home runs/demo --robot r0 --tasks S1,S2`.

The loop: take the newest approved policy at the episode boundary, run an episode, record it frame by frame in the
spool, let the client's thread send it. SIGTERM ends it at the next boundary; SIGKILL at any moment loses at most the
unfinished attempt. A robot whose server is away goes on with the policy that it has, until its spool is full.

With `ingest_url` set, all that it needs is that URL, `robot_token` and the trusted keys below its home; otherwise
catalog and store are at hand. Nothing here imports torch, and the remote robot no database driver either.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.inference import load_policy
from infra.edge.server import RobotServer
from infra.edge.spool import Spool
from infra.episode import Outcome
from infra.errors import ConfigError, LwdError, StorageFullError
from infra.files import write_durably
from infra.fleet.contact import Contact
from infra.fleet.contact import say as _say
from infra.fleet.operator import Operator, TakeoverOperator
from infra.fleet.rollout import ActionPolicy, Job, generator
from infra.fleet.scene import ACTION_DIM, CONTROL_PERIOD, SceneEnv
from infra.fleet.tasks import task
from infra.policy.keys import load_trusted
from infra.policy.permission import Validity
from infra.policy.subscriber import ActivePolicy, PolicySubscriber
from infra.process import log_to, process_arguments, run_process
from infra.settings import MIB, Settings, load_settings
from infra.telemetry import tracing


@dataclass(frozen=True)
class RobotConfig:
    """What one robot does.

    Attributes:
        robot_id: its name; spool, policies and progress lie under it.
        tasks: run in turn.
        seed: with the name and the episode's number, seeds everything random.
        operator: probability that a human attends an episode and may take over.
        execute: actions of a chunk executed before replanning; None for all.
        episodes: closed episodes after which the robot ends, over all its lives; None for no end.
        cohort: whose policies it follows.
        drain_s: at the end, how long to wait for the spool to empty.
        pace: multiple of real time at which episodes run; 0 is as fast as the machine can.
    """

    robot_id: str
    tasks: tuple[str, ...]
    seed: int = 0
    operator: float = 0.0
    execute: int | None = None
    episodes: int | None = None
    cohort: str = "learning"
    drain_s: float = 5.0
    pace: float = 0.0


class Robot:
    """Runs episodes until its number is reached or `stop` is set.

    Args:
        config, settings: what to do and where.
        stop: set to end at the next boundary.
        make_env: makes the scene.
    """

    def __init__(
        self,
        config: RobotConfig,
        settings: Settings,
        stop: threading.Event,
        make_env: Callable[[], SceneEnv] = SceneEnv,
    ) -> None:
        for key in config.tasks:
            task(key)
        self.config = config
        self._settings = settings
        self._stop = stop
        self._home = settings.robots_dir / config.robot_id
        self._home.mkdir(parents=True, exist_ok=True)
        self._server = connect(config, settings)
        spool = Spool(settings.spool_dir / config.robot_id, max_bytes=settings.spool_max_mib * MIB)
        for closed in spool.recovered:
            _say("recovered", episode_id=closed.episode_id)
        self.client = EdgeClient(config.robot_id, spool, self._server, poll_s=settings.poll_s, on_event=_event)
        self.subscriber = PolicySubscriber(
            self._home / "policy", config.cohort, self._server, load_trusted(settings.keys_dir),
            validity=Validity(settings.permit_canary_s, settings.permit_learning_s, settings.permit_champion_s),
        )  # fmt: skip
        self._contact = Contact(self._server, self.subscriber, spool, config.tasks, settings.poll_s)
        self._env = make_env()
        self._operator: Operator | None = TakeoverOperator(config.operator) if config.operator > 0 else None
        self._policy: ActionPolicy | None = None
        self._unusable: Path | None = None
        self._started, self._closed = self._read_progress()

    def run(self) -> int:
        """The loop; returns how many episodes this robot has closed in all its lives."""
        self.client.start()
        try:
            while not self._stop.is_set() and (self.config.episodes is None or self._closed < self.config.episodes):
                try:
                    self._boundary()
                    if self._policy is None or not self._contact.permitted():
                        self._stop.wait(self._settings.poll_s)
                    else:
                        self._episode(self._policy)
                except StorageFullError as error:  # safe stop: nothing is recorded until there is room again
                    _say("stopped: full", logging.ERROR, problem=error.problem)
                    self._stop.wait(max(self._settings.poll_s, 1.0))
        finally:
            self.client.stop()
            try:
                left = self.client.drain(self.config.drain_s)
                self._contact.heartbeat(self._closed, ended=True)
                _say("ended", closed=self._closed, unconfirmed=left)
            except LwdError as error:  # what is not sent stays in the spool for the next life
                _say("ended", logging.WARNING, closed=self._closed, problem=error.problem)
            self._env.close()
            self.client.spool.release()
            self._server.close()
        return self._closed

    def _boundary(self) -> None:
        """Between episodes: take the newest approved policy, tell the server that this robot lives."""
        had = self._policy is not None  # a first policy was not waited for
        self._contact.poll(waited_for=had, keep_refusal=self._unusable is not None)
        staged, active = self.subscriber.staged, self.subscriber.active
        if staged is not None and staged.bundle != self._unusable:
            if self._load(staged):
                self.subscriber.activate_at_boundary()
                self._unusable, self._contact.refusal = None, ""
                if had:
                    self._contact.measure("publish_to_active_s", staged)
            else:
                self._unusable = staged.bundle
        if self._policy is None and active is not None and active.bundle != self._unusable and not self._load(active):
            self._unusable = active.bundle
        self._contact.heartbeat(self._closed)

    def _load(self, candidate: ActivePolicy) -> bool:
        """Make a verified policy the one that acts; False if it is not for this robot: what acted before goes on."""
        try:
            policy = load_policy(candidate.bundle, version=candidate.version)
        except LwdError as error:
            self._contact.refuse(error)
            return False
        self._policy = policy
        _say("policy", version=candidate.version)
        return True

    def _episode(self, policy: ActionPolicy) -> None:
        number = self._started
        key = self.config.tasks[number % len(self.config.tasks)]
        job = Job(key, _seed(self.config, number))
        self._started += 1
        self._write_progress()  # before the attempt: a killed one is not repeated with the same seed
        env, operator = self._env, self._operator
        observation, _ = env.reset(seed=job.seed, options={"task": key})
        rng = generator(job)
        if operator is not None:
            operator.reset(env, np.random.default_rng([job.seed, 2]))
        episode_id = self.client.begin(key, env.instruction, source="online", policy_version=policy.version)
        execute = self.config.execute or policy.horizon
        chunk, cursor, steps, takeover = np.empty((0, ACTION_DIM), np.float32), execute, 0, None
        outcome: Outcome | None = None
        began = time.monotonic()
        while outcome is None:
            if self.config.pace:
                time.sleep(max(0.0, began + steps * CONTROL_PERIOD / self.config.pace - time.monotonic()))
            if takeover is None and operator is not None and operator.observe(env, steps):
                takeover = steps
            if takeover is not None and operator is not None:
                action = operator.act(env)
            else:
                if cursor >= execute:
                    noise = rng.standard_normal((1, policy.horizon, ACTION_DIM), np.float32)
                    chunk, cursor = policy.act(observation[None], [env.instruction], noise)[0], 0
                action, cursor = chunk[cursor], cursor + 1
            action = np.clip(action, -1.0, 1.0).astype(np.float32)  # recorded as executed
            after, reward, terminated, truncated, info = env.step(action)
            self.client.record(Frame(observation, action, reward, takeover is not None, steps * CONTROL_PERIOD))
            observation, steps = after, steps + 1
            if terminated:
                outcome = "success" if info["success"] else "failure"
            elif truncated:
                outcome = "time_limit"
        extra: dict[str, Any] = {"seed": job.seed, "number": number}
        if takeover is not None:
            extra["takeover_step"] = takeover
        self.client.close(observation, steps * CONTROL_PERIOD, outcome, env.substep_scores, extra)
        self._closed += 1
        self._write_progress()
        _say("episode", episode_id=episode_id, task=key, outcome=outcome, steps=steps, takeover=takeover,
             policy=policy.version, closed=self._closed)  # fmt: skip

    def _read_progress(self) -> tuple[int, int]:
        path = self._home / "progress.json"
        if not path.exists():
            return 0, 0
        try:
            document = json.loads(path.read_bytes())
            return int(document["started"]), int(document["closed"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is not a robot's progress ({error})", "move it away to count from 0") from error

    def _write_progress(self) -> None:
        document = {"started": self._started, "closed": self._closed}
        write_durably(self._home / "progress.json", json.dumps(document).encode())


def connect(config: RobotConfig, settings: Settings) -> RobotServer:
    """The robot's server: the service at `ingest_url`, or the catalog and the store themselves.

    Raises:
        ConfigError: a setting is missing, or the catalog is not of this version.
    """
    if settings.ingest_url is not None:
        from infra.edge.remote import RemoteServer

        return RemoteServer.from_settings(settings, config.robot_id, config.cohort)
    from infra.fleet.embedded import EmbeddedServer

    return EmbeddedServer.open(settings, config.robot_id, config.cohort)


def robot_command(home: Path, config: RobotConfig) -> list[str]:
    """The command that runs this robot."""
    command = [sys.executable, "-m", "infra.fleet.robot", "--home", str(home), "--robot", config.robot_id]
    command += ["--tasks", ",".join(config.tasks), "--seed", str(config.seed), "--operator", str(config.operator)]
    command += ["--cohort", config.cohort, "--drain", str(config.drain_s), "--pace", str(config.pace)]
    if config.execute is not None:
        command += ["--execute", str(config.execute)]
    if config.episodes is not None:
        command += ["--episodes", str(config.episodes)]
    return command


def robot_environment() -> dict[str, str]:
    """Variables of a robot's process: one thread, so that four robots and a learner share two cores in peace."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def spawn_robot(home: Path, config: RobotConfig) -> subprocess.Popen[bytes]:
    """Start this robot as a process; its log is `<home>/logs/robot-<id>.jsonl`."""
    command = [*robot_command(home, config), "--parent", str(os.getpid())]
    return subprocess.Popen(command, env=os.environ | robot_environment(), stdin=subprocess.DEVNULL)


def _seed(config: RobotConfig, number: int) -> int:
    mixed = np.random.SeedSequence([config.seed, zlib.crc32(config.robot_id.encode()), number])
    return int(mixed.generate_state(1)[0])


def _event(event: str, fields: dict[str, Any]) -> None:
    _say(event, logging.WARNING if event == "trouble" else logging.INFO, **fields)


def _serve(home: Path, config: RobotConfig, stop: threading.Event) -> None:
    settings = load_settings(home=home)
    log_to(settings.logs_dir, f"robot-{config.robot_id}")
    tracing.start(f"robot-{config.robot_id}")  # its metrics come with its heartbeats
    Robot(config, settings, stop).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one robot; exit code of the error otherwise."""
    parser = process_arguments("infra.fleet.robot", "Run one simulated robot.")
    parser.add_argument("--robot", required=True, help="this robot's name")
    parser.add_argument("--tasks", required=True, help="comma-separated keys, run in turn: S1,S2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operator", type=float, default=0.0, help="probability that a human attends an episode")
    parser.add_argument("--execute", type=int, help="actions of a chunk executed before replanning")
    parser.add_argument("--episodes", type=int, help="end after so many closed episodes")
    parser.add_argument("--cohort", default="learning", choices=("learning", "canary", "production"))
    parser.add_argument("--drain", type=float, default=5.0, help="seconds to wait at the end for the spool to empty")
    parser.add_argument("--pace", type=float, default=0.0, help="multiple of real time; 0 is as fast as possible")
    options = parser.parse_args(arguments)
    config = RobotConfig(
        robot_id=options.robot,
        tasks=tuple(key for key in options.tasks.split(",") if key),
        seed=options.seed,
        operator=options.operator,
        execute=options.execute,
        episodes=options.episodes,
        cohort=options.cohort,
        drain_s=options.drain,
        pace=options.pace,
    )
    return run_process(options, lambda stop: _serve(options.home, config, stop), label=f"robot {config.robot_id}")


if __name__ == "__main__":
    sys.exit(main())
