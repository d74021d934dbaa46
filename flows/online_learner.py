"""The learner of the online stage, a process: `python -m flows.online_learner --home runs/demo/home`.

Reads snapshots as they come, mixes them 1:1 with the offline buffer, updates the agent, publishes a policy every
`publish_every` updates (Algorithm 1, stage 2). Killed at any moment, it goes on from its last checkpoint with the
replay that it had then.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows.deployment import Deployment, deployment
from flows.params import Params, load_params
from flows.stages.common import BUFFER, CHECKPOINT, OFFLINE, n_step, replay_for
from infra.files import write_durably
from infra.process import log_to, patiently, process_arguments, run_process
from infra.reader import Increment, SnapshotReader
from infra.telemetry import metrics, milestones, tracing
from lwd_model.bundle import export_bundle
from lwd_model.chunks import Batch, Replay, mixed_sample
from lwd_model.learner import Learner
from lwd_model.shards import read_buffer

STATUS, ROWS = "status.json", "training.jsonl"
_TELL_S = 1.0


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
    fresh: dict[str, float] = field(default_factory=dict)  # online episodes never drawn from: held since when

    @property
    def updates(self) -> int:
        return self.learner.updates - self.began_at

    @property
    def allowed(self) -> int:
        """Updates that the data at hand allow."""
        p = self.params.online
        return min(p.updates, int(len(self.online.episodes) * p.updates_per_episode))

    def take(self, increment: Increment) -> None:
        """Bring the online replay to the increment's snapshot."""
        for episode_id in increment.removed:
            self.online.remove(episode_id)
            self.fresh.pop(episode_id, None)
        for episode in increment.added:
            self.online.add(episode, n_step(episode.task, self.learner.config.learner))
        self.learner.snapshot_version = increment.version
        if milestones.on():
            self.fresh |= {episode.episode_id: time.time() for episode in increment.added}
        metrics.REPLAY_EPISODES.set(len(self.online.episodes))

    def update(self) -> dict[str, float] | None:
        """One update; its metrics every 20."""
        every: list[dict[str, float] | None] = []
        with metrics.UPDATE_SECONDS.time():
            self.learner.fit(self._sample, 1, on_step=lambda _, row: every.append(row), metrics_every=20)
        metrics.UPDATES.inc()
        for kind, value in (every[0] or {}).items():
            metrics.TRAINING.set(value, kind=kind)
        return every[0]

    def _sample(self, rng: np.random.Generator) -> Batch:
        config = self.learner.config.learner
        batch = mixed_sample(self.offline, self.online, config.batch, rng, config.online_fraction, balanced=True)
        if self.fresh:
            drawn = self.online.owners(batch.index[batch.online]) & self.fresh.keys()
            milestones.sampled({episode_id: self.fresh.pop(episode_id) for episode_id in drawn})
        return batch

    def publish(self) -> int:
        """Publish the deployed policy and keep a checkpoint that knows of it."""
        agent = self.learner.agent
        with metrics.PUBLISH_SECONDS.time():
            bundle = export_bundle(agent.deployed, agent.normaliser, self.learner.config.policy, self.folder / "bundle")
            version = self.plane.publisher.publish(
                bundle,
                snapshot_version=self.learner.snapshot_version or 0,
                parent=self.learner.position.get("version"),
                details={"stage": "online", "updates": self.updates, "episodes": len(self.online.episodes)},
            )
        self.learner.position |= {"version": version, "published_at": self.updates}
        self.learner.save(self.folder / CHECKPOINT)
        return version

    def tell(self, started: float) -> None:
        """Write the status that the flow shows."""
        status = {
            "updates": self.updates,
            "allowed": self.allowed,
            "episodes": len(self.online.episodes),
            "version": self.learner.position.get("version"),
            "snapshot": self.learner.snapshot_version or 0,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_durably(self.folder / STATUS, json.dumps(status).encode())
        metrics.UPDATES_DONE.set(self.updates)
        metrics.UPDATES_ALLOWED.set(self.allowed)


def start(params: Params, plane: Deployment) -> OnlineLearner:
    """From the last checkpoint where there is one, else from the offline stage's."""
    folder = plane.settings.home / "learner"
    folder.mkdir(parents=True, exist_ok=True)
    p = params.online
    options: dict[str, Any] = {"tau_base": p.tau_base, "updates": p.updates, **p.learner}
    resumed = (folder / CHECKPOINT).exists()
    source = folder / CHECKPOINT if resumed else OFFLINE / CHECKPOINT
    learner = Learner.resume(source, options, threads=params.workers)
    if not resumed:
        # Its parent is what the fleet runs now: the newest policy, published from the offline stage.
        parent = plane.registry.policies()[0]["version"]
        learner.snapshot_version, learner.position = 0, {"began_at": learner.updates, "version": parent}
    offline, online = replay_for(learner.config), replay_for(learner.config)
    for episode in read_buffer(BUFFER):
        offline.add(episode, n_step(episode.task, learner.config.learner))
    return OnlineLearner(params, plane, folder, learner, offline, online, learner.position["began_at"])


def run(params: Params, plane: Deployment, stop: threading.Event) -> None:
    """Learn until the stage's updates are done or `stop` is set."""
    loop = start(params, plane)
    target = loop.learner.snapshot_version or 0
    rows = _resumed_rows(loop)
    started, told = time.monotonic(), 0.0
    with SnapshotReader(plane.settings, name="learner") as reader:
        while reader.version < target:
            # A resumed learner holds what it held when its checkpoint was written before it goes on.
            if (increment := patiently(lambda: reader.wait(30.0), stop)) is not None:
                loop.take(increment)
            elif stop.is_set():
                return
        loop.fresh.clear()  # those were drawn from in an earlier life
        with rows.open("a", buffering=1) as log:
            while not stop.is_set() and loop.updates < params.online.updates:
                if (increment := patiently(reader.poll, stop)) is not None:
                    loop.take(increment)
                if time.monotonic() - told > _TELL_S:
                    loop.tell(started)
                    told = time.monotonic()
                if loop.updates >= loop.allowed:
                    stop.wait(plane.settings.poll_s)
                    continue
                row = loop.update()
                if row is not None:
                    log.write(json.dumps({"update": loop.updates, **row}) + "\n")
                if loop.updates % params.online.publish_every == 0:
                    patiently(loop.publish, stop)
    if not stop.is_set() and loop.learner.position.get("published_at") != loop.updates:
        patiently(loop.publish, stop)
    elif stop.is_set():
        loop.learner.save(loop.folder / CHECKPOINT)
    loop.tell(started)


def _resumed_rows(loop: OnlineLearner) -> Path:
    """The metrics' file, without rows of updates that the checkpoint has not seen (they will be done again)."""
    path = loop.folder / ROWS
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["update"] <= loop.updates]
        path.write_text("".join(f"{line}\n" for line in kept))
    return path


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    with deployment(options.home) as plane:
        log_to(plane.settings.logs_dir, "learner")
        metrics.serve(plane.settings, "learner")
        tracing.start("learner")
        run(load_params(options.params), plane, stop)


def main() -> int:
    """Run until done or SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("flows.online_learner", "Learn while deployed.")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    options = parser.parse_args()
    return run_process(options, lambda stop: _serve(options, stop), label="learner")


if __name__ == "__main__":
    sys.exit(main())
