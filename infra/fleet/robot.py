"""One robot as a process: `python -m infra.fleet.robot --home runs/demo --robot r0 --tasks S1,S2`.

The loop: take the newest approved policy at the episode boundary, run an episode, record it frame by frame in the
spool, let the client's thread send it. Every action passes the shield; a policy that gives none that can be executed is
rejected for ever, and the one before it acts again. What the robot's own parts raise costs the attempt, not the robot,
until it happens `MAX_FAILURES` times in a row. SIGTERM ends it at the next boundary; SIGKILL at any moment loses at
most the unfinished attempt. A robot whose server is away goes on with the policy that it has, until its spool is full.

With `ingest_url` set, all that it needs is that URL, `robot_token` and the trusted keys below its home; otherwise
catalog and store are at hand. Nothing here imports torch, and the remote robot no database driver either.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infra.edge.client import EdgeClient
from infra.edge.inference import Embodiment, load_policy
from infra.edge.server import RobotServer
from infra.edge.shield import Limits, PolicyFaultError, Shield
from infra.edge.spool import Spool
from infra.edge.watchdog import Inference
from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError, summary
from infra.files import read_capped, write_durably
from infra.fleet.attempt import Attempt
from infra.fleet.contact import Contact
from infra.fleet.contact import say as _say
from infra.fleet.operator import Operator, TakeoverOperator
from infra.fleet.rollout import Job
from infra.fleet.scene import ACTION_DIM, CONTROL_PERIOD, SceneEnv
from infra.fleet.tasks import task
from infra.policy.keys import load_trusted
from infra.policy.permission import Validity
from infra.policy.subscriber import ActivePolicy, PolicySubscriber
from infra.process import backoff, load_callable, log_to, process_arguments, run_process
from infra.settings import MIB, Settings, load_settings
from infra.telemetry import tracing

MAX_FAILURES = 5  # attempts in a row that the robot's own parts may spoil before it ends
_log = logging.getLogger("lwd.robot")


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
        patience: multiple of the shield's deadlines, by the wall clock (divided by `pace`). 1 is what an arm needs. A
            simulator waits for its policy and shares its machine: with 100, an inference of 0.05 s is late after 5 s.
        shield: `module:function` that gives the shield's limits as plain values; the action's limits alone without it.
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
    patience: float = 100.0
    shield: str | None = None


class Robot:
    """Runs episodes until its number is reached or `stop` is set.

    Args:
        config, settings: what to do and where.
        stop: set to end at the next boundary.
        make_env: makes the scene.

    Raises:
        ConfigError: an unknown task, or limits that this robot cannot keep to.
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
        limits = _limits(config)
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
        self._make_env = make_env
        operator: Operator | None = TakeoverOperator(config.operator) if config.operator > 0 else None
        self._attempt = Attempt(
            self.client, make_env(), operator, Shield(limits), CONTROL_PERIOD, config.pace, config.patience
        )
        self._inference: Inference | None = None
        self._running: Path | None = None  # the bundle of the policy that acts
        self._failures = 0  # of the robot's own parts, in a row
        self._unusable: set[Path] = set()  # bundles that cannot be loaded here
        self._started, self._closed = self._read_progress()

    def run(self) -> int:
        """The loop; returns how many episodes this robot has closed in all its lives."""
        self.client.start()
        try:
            while not self._stop.is_set() and (self.config.episodes is None or self._closed < self.config.episodes):
                try:
                    self._once()
                except StorageFullError as error:  # safe stop: nothing is recorded until there is room again
                    _say("stopped: full", logging.ERROR, problem=error.problem)
                    self._stop.wait(max(self._settings.poll_s, 1.0))
        finally:
            self._end()
        return self._closed

    def _once(self) -> None:
        """A boundary, and an episode if there is a policy."""
        try:
            self._boundary()
        except LwdError:
            raise
        except Exception as error:
            self._failed(error)
            return
        if self._inference is None:
            self._stop.wait(self._settings.poll_s)
        else:
            self._episode(self._inference)

    def _end(self) -> None:
        """Send what can be sent, say goodbye, give everything back; none of it keeps the robot from ending."""
        self.client.stop()
        try:
            left = self.client.drain(self.config.drain_s)
            self._contact.heartbeat(self._closed, ended=True)
            _say("ended", closed=self._closed, unconfirmed=left)
        except Exception as error:  # what is not sent stays in the spool for the next life
            problem = error.problem if isinstance(error, LwdError) else summary(error)
            _say("ended", logging.WARNING, closed=self._closed, problem=problem)
        for give_back in (self._attempt.env.close, self.client.spool.release, self._server.close):
            try:
                give_back()
            except Exception as error:
                _say("not given back", logging.WARNING, problem=summary(error))

    def _boundary(self) -> None:
        """Between episodes: take the newest approved policy, tell the server that this robot lives."""
        had = self._inference is not None  # a first policy was not waited for
        self._contact.poll(waited_for=had, keep_refusal=bool(self._unusable))
        while (staged := self.subscriber.staged) is not None:
            if not self._load(staged):
                self.subscriber.pass_over()
                continue
            self.subscriber.activate_at_boundary()
            if not self.subscriber.passed_over:
                self._unusable.clear()
                self._contact.refusal = ""
            if had:
                self._contact.measure("publish_to_active_s", staged)
            break
        self._follow(self.subscriber.active if self._contact.permitted() else None)
        self._contact.heartbeat(self._closed)

    def _follow(self, active: ActivePolicy | None) -> None:
        """Run the active policy and no other; one that cannot be loaded gives way to the one before. Without any,
        nothing acts."""
        while active is not None:
            if self._running == active.bundle or self._load(active):
                return
            active = self.subscriber.reject(active.version, self._contact.refusal)
        if self._inference is not None:
            self._inference.close()
        self._inference, self._running = None, None

    def _load(self, candidate: ActivePolicy) -> bool:
        """Make a verified policy the one that acts; False if it is not for this robot: what acted before goes on."""
        if candidate.bundle in self._unusable:
            return False
        embodiment = self._embodiment()
        try:
            policy = load_policy(candidate.bundle, version=candidate.version, embodiment=embodiment)
        except Exception as error:
            known = error if isinstance(error, LwdError) else CorruptDataError(
                f"policy {candidate.version} cannot be loaded ({summary(error)})", "export it again"
            )  # fmt: skip
            self._unusable.add(candidate.bundle)
            self._contact.refuse(known, candidate.version)
            return False
        if self._inference is not None:
            self._inference.close()
        self._inference, self._running = Inference(policy), candidate.bundle
        _say("policy", version=candidate.version)
        return True

    def _embodiment(self) -> Embodiment:
        instructions = tuple(task(key).instruction for key in self.config.tasks)
        return Embodiment(len(self._attempt.env.features), ACTION_DIM, instructions)

    def _episode(self, inference: Inference) -> None:
        """One attempt. What its parts raise discards it; too often in a row, and the robot ends with that error.

        Raises:
            StorageFullError: no room on this robot's disk. UnavailableError: `MAX_FAILURES` attempts failed in a row.
        """
        number = self._started
        key = self.config.tasks[number % len(self.config.tasks)]
        job = Job(key, _seed(self.config, number))
        try:
            inference = self._free(inference)
            self._started += 1
            self._write_progress()  # before the attempt: a killed one is not repeated with the same seed
            ended = self._attempt.run(inference, job, self.config.execute, {"seed": job.seed, "number": number})
            self._closed += 1
            self._write_progress()
        except Exception as error:
            self._failed(error)
            return
        self._failures = 0
        self._contact.safety.update(ended.safety)
        _say("episode", episode_id=ended.episode_id, task=key, outcome=ended.outcome, steps=ended.steps,
             takeover=ended.takeover, policy=inference.policy.version, closed=self._closed,
             safety=dict(ended.safety))  # fmt: skip
        if ended.fault is not None:
            self._reject(inference, ended.fault)
        else:
            self._contact.help = ""

    def _free(self, inference: Inference) -> Inference:
        """The policy's inference without a question of an attempt that is over: its answer would be the next one's."""
        if not inference.forget():  # its thread is still busy with that
            inference.close()
            inference = self._inference = Inference(inference.policy)
        return inference

    def _reject(self, inference: Inference, fault: PolicyFaultError) -> None:
        """The policy failed at work: never again on this robot; the one before it acts from the next boundary on."""
        version = inference.policy.version
        assert version is not None  # it came through the policy channel
        inference.close()
        self._inference, self._running = None, None
        self._contact.help = f"policy {version}: {fault.problem}"
        active = self.subscriber.reject(version, fault.problem)
        _say("policy rejected", logging.ERROR, version=version, problem=fault.problem,
             back_to=active.version if active else None)  # fmt: skip

    def _failed(self, error: Exception) -> None:
        """Discard the open attempt, say why, and begin with a new scene after a pause.

        Raises:
            StorageFullError: it was the disk. UnavailableError: too many failures in a row.
        """
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = error.problem if isinstance(error, LwdError) else summary(error)
        self.client.discard(problem[:1000])
        if isinstance(error, StorageFullError):
            raise error
        if full:
            raise StorageFullError(f"no space left for the robot ({problem})", "free disk space") from error
        self._count(error, problem)
        with contextlib.suppress(Exception):
            self._attempt.env.close()
        while not self._stop.is_set():
            try:
                self._attempt.env = self._make_env()
                return
            except Exception as failed:
                self._count(
                    failed, f"no new scene: {failed.problem if isinstance(failed, LwdError) else summary(failed)}"
                )

    def _count(self, error: Exception, problem: str) -> None:
        """One failure more; a pause before the next try.

        Raises:
            UnavailableError: too many in a row.
        """
        self._failures += 1
        self._contact.help = f"attempt failed: {problem}"
        _log.error("attempt failed", exc_info=error, extra={"fields": {"problem": problem, "in_a_row": self._failures}})
        if self._failures >= MAX_FAILURES:
            raise UnavailableError(
                f"robot {self.config.robot_id}: {self._failures} attempts in a row failed, the last one: {problem}",
                f"look at the traceback in its log, and at {self.client.spool.root / 'journal.jsonl'}",
            ) from error
        self._stop.wait(backoff(self._failures, self._settings.poll_s, 10.0))

    def _read_progress(self) -> tuple[int, int]:
        path = self._home / "progress.json"
        if not path.exists():
            return 0, 0
        try:
            document = json.loads(read_capped(path, 2**12))
            return int(document["started"]), int(document["closed"])
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(f"{path} is not a robot's progress ({error})", "move it away to count from 0") from error

    def _write_progress(self) -> None:
        document = {"started": self._started, "closed": self._closed}
        write_durably(self._home / "progress.json", json.dumps(document).encode())


def _limits(config: RobotConfig) -> Limits:
    """The shield's limits, and whether this robot can keep to them."""
    for name, value, least in (("pace", config.pace, 0.0), ("patience", config.patience, 1.0)):
        if not least <= value < float("inf"):
            raise ConfigError(f"{name} is {value}", f"give a number of at least {least:g}")
    limits = Limits.of(load_callable(config.shield)()) if config.shield else Limits.box(ACTION_DIM)
    if limits.action_dim != ACTION_DIM:
        raise ConfigError(
            f"the shield is of {limits.action_dim}-D actions, this robot of {ACTION_DIM}-D", "use its own contract"
        )
    if not math.isclose(limits.period_s, CONTROL_PERIOD):
        raise ConfigError(
            f"the shield is of a control period of {limits.period_s:g} s, this robot of {CONTROL_PERIOD:g} s",
            "use its own contract",
        )
    return limits


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
    command += ["--patience", str(config.patience)]
    if config.shield is not None:
        command += ["--shield", config.shield]
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
    parser.add_argument("--patience", type=float, default=100.0, help="multiple of the shield's deadlines; 1 on an arm")
    parser.add_argument("--shield", help="module:function that gives the shield's limits")
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
        patience=options.patience,
        shield=options.shield,
    )
    return run_process(options, lambda stop: _serve(options.home, config, stop), label=f"robot {config.robot_id}")


if __name__ == "__main__":
    sys.exit(main())
