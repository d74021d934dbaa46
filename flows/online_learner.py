"""The learner of the online stage, a process: `python -m flows.online_learner --home runs/demo/home`.

Reads snapshots as they come, mixes them 1:1 with the offline buffer, updates the agent, publishes a policy every
`publish_every` updates (Algorithm 1, stage 2). Killed at any moment, it goes on from its last checkpoint with the
replay that it had then.

With `online.ranks` above 1 that process starts so many of its kind, as torchrun would, and ends with the first of them
that dies: all ranks begin again together, from the checkpoint. Rank 0 alone publishes, saves and tells. Ranks on
several machines are started with torchrun itself and need the home's folder on a file system that they share.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows.deployment import Deployment, deployment
from flows.learner_health import Recovery
from flows.learner_intake import Intake
from flows.learner_lease import LearnerLease
from flows.params import Params, load_params
from flows.processes import STATUS
from flows.stages.checked import checked_episodes
from flows.stages.common import BUFFER, CHECKPOINT, OFFLINE, n_step, replay_for
from infra.errors import UnavailableError
from infra.files import write_durably
from infra.process import log_to, patiently, process_arguments, run_process
from infra.reader import Increment, SnapshotReader
from infra.telemetry import metrics, milestones, tracing
from lwd_model.bundle import export_bundle
from lwd_model.chunks import Batch, Replay, mixed_sample
from lwd_model.learner import Learner
from lwd_model.ranks import AgreedReader, Ranks

ROWS = "training.jsonl"
_TELL_S = 1.0
_SHUTDOWN_S = 10  # for a rank to leave when another has died


@dataclass
class OnlineLearner:
    """The loop's state: what it learns, from what, and how far it is allowed to go.

    `updates` counts from the beginning of the online stage; the data limits them to `updates_per_episode` per online
    episode, so that a fast learner does not overfit the first episodes and a slow one loses none.
    """

    params: Params
    plane: Deployment
    folder: Path
    learner: Learner
    offline: Replay
    online: Replay
    began_at: int
    intake: Intake
    recovery: Recovery
    lease: LearnerLease | None  # rank 0's
    fresh: dict[str, float] = field(default_factory=dict)  # online episodes never drawn from: held since when

    @property
    def updates(self) -> int:
        return self.learner.updates - self.began_at

    @property
    def allowed(self) -> int:
        """Updates that the data at hand allow."""
        p = self.params.online
        return min(p.updates, int(len(self.online.episodes) * p.updates_per_episode))

    def take(self, increment: Increment, stop: threading.Event) -> None:
        """Bring the online replay to the increment's snapshot; what cannot be taken is withdrawn."""
        taken = self.intake.take(increment, stop)
        for episode_id in increment.removed:
            self.fresh.pop(episode_id, None)
        self.learner.snapshot_version = increment.version
        if milestones.on() and self.learner.ranks.rank == 0:  # the others draw the rest of the same batches
            self.fresh |= {episode.episode_id: time.time() for episode in taken}
        metrics.REPLAY_EPISODES.set(len(self.online.episodes))

    def update(self) -> dict[str, float] | None:
        """One update; its metrics every 20. A fall is handled: the learner is then back at its good checkpoint.

        Raises:
            DivergedError: too many falls in a row.
        """
        every: list[dict[str, float] | None] = []
        with metrics.UPDATE_SECONDS.time():
            self.learner.fit(self._sample, 1, on_step=lambda _, row: every.append(row), metrics_every=20)
        metrics.UPDATES.inc()
        row = every[0]
        # Fetching numbers stalls a GPU; before anything is published they are looked at in any case.
        due = row is not None or self.learner.fabric.device.type == "cpu" or self.publishes
        if due:
            numbers = row or {kind: float(value) for kind, value in self.learner.numbers.items()}
            problem = self.recovery.judge(numbers)
            if problem is None and self.publishes:
                problem = self.recovery.judge_weights()
            if problem is not None:
                self.recovery.fall(problem)
                return None
        for kind, value in (row or {}).items():
            metrics.TRAINING.set(value, kind=kind)
        return row

    @property
    def publishes(self) -> bool:
        """Whether a policy is due after as many updates as were done."""
        return self.updates % self.params.online.publish_every == 0 or self.updates >= self.params.online.updates

    def _sample(self, rng: np.random.Generator) -> Batch:
        config, part = self.learner.config.learner, self.learner.ranks.part(self.learner.config.learner.batch)
        batch = mixed_sample(
            self.offline, self.online, config.batch, rng, config.online_fraction, balanced=True, part=part
        )
        if self.fresh:
            drawn = self.online.owners(batch.index[batch.online]) & self.fresh.keys()
            milestones.sampled({episode_id: self.fresh.pop(episode_id) for episode_id in drawn})
        return batch

    def publish(self) -> int:
        """Publish the deployed policy and keep a checkpoint that knows of it.

        Raises:
            LeaseLostError: another learner took over; nothing was announced or saved.
            DivergedError: the policy is not finite.
        """
        agent = self.learner.agent
        if self.lease is not None:
            self.lease.prove()  # the bundle's folder is the holder's as well
        with metrics.PUBLISH_SECONDS.time():
            bundle = export_bundle(agent.deployed, agent.normaliser, self.learner.config.policy, self.folder / "bundle")
            version = self.plane.publisher.publish(
                bundle,
                snapshot_version=self.learner.snapshot_version or 0,
                parent=self.learner.position.get("version"),
                details={"stage": "online", "updates": self.updates, "episodes": len(self.online.episodes)},
                guard=self.lease.guard if self.lease else None,
            )
        self.learner.position |= {"version": version, "published_at": self.updates}
        self.save()
        return version

    def save(self) -> None:
        """Keep a checkpoint; LeaseLostError if another learner took over."""
        if self.lease is not None:
            self.lease.prove()
        self.recovery.grow_good()
        self.learner.save(self.folder / CHECKPOINT)
        self.recovery.saved()

    def tell(self, started: float) -> None:
        """Write the status that the flow shows."""
        status = {
            "updates": self.updates,
            "allowed": self.allowed,
            "episodes": len(self.online.episodes),
            "version": self.learner.position.get("version"),
            "snapshot": self.learner.snapshot_version or 0,
            "falls": self.recovery.falls,
            "problem": self.recovery.problem,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_durably(self.folder / STATUS, json.dumps(status, allow_nan=False).encode())
        metrics.UPDATES_DONE.set(self.updates)
        metrics.UPDATES_ALLOWED.set(self.allowed)


def start(params: Params, plane: Deployment, ranks: Ranks, lease: LearnerLease | None = None) -> OnlineLearner:
    """From the last checkpoint where there is one, else from the offline stage's."""
    folder = plane.settings.home / "learner"
    folder.mkdir(parents=True, exist_ok=True)
    p = params.online
    options: dict[str, Any] = {"tau_base": p.tau_base, "updates": p.updates, **p.learner}
    resumed = (folder / CHECKPOINT).exists()
    source = folder / CHECKPOINT if resumed else OFFLINE / CHECKPOINT
    learner = Learner.resume(source, options, threads=max(1, params.workers // ranks.world), ranks=ranks)
    if not resumed:
        # Its parent is what the fleet runs now: the newest policy, published from the offline stage.
        parent = plane.registry.policies()[0]["version"]
        learner.snapshot_version, learner.position = 0, {"began_at": learner.updates, "version": parent}
    offline, online = replay_for(learner.config), replay_for(learner.config)
    window = functools.partial(n_step, config=learner.config.learner)
    for episode in checked_episodes(BUFFER, 0.0)[0]:
        offline.add(episode, window(episode.task))
    snapshots = plane.snapshots if ranks.rank == 0 else None
    return OnlineLearner(
        params, plane, folder, learner, offline, online, learner.position["began_at"],
        Intake(online, learner.config.policy, window, snapshots, folder),
        Recovery(learner, folder, p.health, lease.prove if lease else lambda: None),
        lease,
    )  # fmt: skip


def run(params: Params, plane: Deployment, stop: threading.Event, ranks: Ranks) -> None:
    """Learn until the stage's updates are done or `stop` is set, on any rank.

    Raises:
        LeaseLostError: another learner works on this home. DivergedError: see `Recovery.fall`.
    """
    lease = LearnerLease(plane.catalog, plane.settings.lease_s) if ranks.rank == 0 else None
    if lease is not None:
        lease.acquire(stop)
    try:
        _run(start(params, plane, ranks, lease), stop)
    finally:
        if lease is not None:
            lease.release()


def _run(loop: OnlineLearner, stop: threading.Event) -> None:
    params, plane, ranks = loop.params, loop.plane, loop.learner.ranks
    target, latest = loop.learner.snapshot_version or 0, plane.snapshots.latest().version
    if target > latest:
        logging.getLogger(__name__).warning(
            "the catalog was restored or built again: it ends at snapshot %d, the learner held %d", latest, target
        )
        target = latest
    first = ranks.rank == 0
    rows = _resumed_rows(loop) if first else Path(os.devnull)
    started, told = time.monotonic(), 0.0
    with SnapshotReader(plane.settings, name=_process_name(ranks)) as source, rows.open("a", buffering=1) as log:
        reader = AgreedReader(lambda: patiently(source.poll, stop), ranks, version=source.version, digest=source.digest)
        while reader.version < target:
            # A resumed learner holds what it held when its checkpoint was written before it goes on.
            if ranks.any(stop.is_set()):
                return
            for increment in (new := reader.advance(target)):
                loop.take(increment, stop)
            if loop.lease is not None:
                loop.lease.check()
            if not new:
                stop.wait(plane.settings.poll_s)
        loop.fresh.clear()  # those were drawn from in an earlier life
        while loop.updates < params.online.updates and not ranks.any(stop.is_set()):
            for increment in reader.advance():
                loop.take(increment, stop)
            if loop.lease is not None:
                loop.lease.check()
            metrics.RANK_STALENESS.set(reader.staleness)
            if first and time.monotonic() - told > _TELL_S:
                loop.tell(started)
                told = time.monotonic()
            if loop.updates >= loop.allowed:
                stop.wait(plane.settings.poll_s)
                continue
            before = loop.updates
            row = loop.update()
            if loop.updates <= before:  # it fell
                continue
            if row is not None:
                log.write(json.dumps({"update": loop.updates, **row}, allow_nan=False) + "\n")
            if first and loop.updates % params.online.publish_every == 0:
                patiently(loop.publish, stop)
    if not first:
        return
    if loop.updates < params.online.updates:
        loop.save()
    elif loop.learner.position.get("published_at") != loop.updates:
        patiently(loop.publish, stop)
    loop.tell(started)


def _resumed_rows(loop: OnlineLearner) -> Path:
    """The metrics' file, without rows of updates that the checkpoint has not seen (they will be done again) and those
    that a full disk has torn."""
    path = loop.folder / ROWS
    if path.exists():
        kept = [row for row in read_rows(path) if row["update"] <= loop.updates]
        write_durably(path, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in kept).encode())
    return path


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of the metrics' file; a line that a crash or a full disk cut short is none."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("update"), int):
                rows.append(row)
    return rows


def _process_name(ranks: Ranks) -> str:
    """`learner`, or `learner-1` and so on for the other ranks: of the log, the reader and the metrics."""
    return f"learner-{ranks.rank}" if ranks.rank else "learner"


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    params = load_params(options.params)
    if params.online.ranks > 1 and "RANK" not in os.environ:
        _launch(options, params.online.ranks)
        return
    ranks = Ranks.from_environment()
    name = _process_name(ranks)
    with deployment(options.home) as plane:
        log_to(plane.settings.logs_dir, name)
        metrics.serve(plane.settings, name)
        tracing.start(name)
        run(params, plane, stop, ranks)


def _launch(options: argparse.Namespace, count: int) -> None:
    """Be the agent of `count` ranks on this machine: start them, and stop all when one dies.

    Raises:
        UnavailableError: a rank ended before its time.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Restarts are the supervisor's, with its pauses and its patience.
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, run_id=f"learner-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", shutdown_timeout=_SHUTDOWN_S,
    )  # fmt: skip
    command = ["-m", "flows.online_learner", "--home", str(options.home), "--params", str(options.params)]
    try:
        elastic_launch(config, sys.executable)(*command, "--parent", str(os.getpid()))
    except SignalException:
        return  # the ranks were told as well
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise UnavailableError(
            f"rank {rank} of {count} ended with exit code {failure.exitcode}",
            "the reason is above, or in the rank's log; all ranks begin again from the last checkpoint",
        ) from error


def main() -> int:
    """Run until done or SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("flows.online_learner", "Learn while deployed.")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    options = parser.parse_args()
    return run_process(options, lambda stop: _serve(options, stop), label="learner")


if __name__ == "__main__":
    sys.exit(main())
