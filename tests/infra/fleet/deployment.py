"""A home with a data plane and policies that robots can run, for tests."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
from invariants import Plane, open_plane
from safetensors.numpy import save_file

from infra.coordinator import Coordinator
from infra.episode import Episode, decode
from infra.events.outbox import OutboxLog
from infra.fleet.features import FEATURES
from infra.fleet.scene import ACTION_DIM
from infra.fleet.tasks import TASKS
from infra.policy.channel import PolicyPublisher
from infra.policy.keys import create_keys

HORIZON, WIDTH, TIME = 5, 8, 4


def scene_bundle(folder: Path, seed: int = 0) -> Path:
    """A small random flow policy for the scene."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    chunk, instructions = HORIZON * ACTION_DIM, [task.instruction for task in TASKS.values()]
    shapes = {
        "state.weight": (WIDTH, len(FEATURES)),
        "state.bias": (WIDTH,),
        "task.embedding": (len(instructions), WIDTH),
        "action.weight": (WIDTH, chunk),
        "time.weight": (WIDTH, TIME),
        "block0.in.weight": (WIDTH, WIDTH),
        "block0.in.bias": (WIDTH,),
        "block0.out.weight": (WIDTH, WIDTH),
        "head.weight": (chunk, WIDTH),
        "head.bias": (chunk,),
    }
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["observation.mean"] = np.zeros(len(FEATURES), np.float32)
    tensors["observation.std"] = np.ones(len(FEATURES), np.float32)
    save_file(tensors, folder / "policy.safetensors")
    policy = {"obs_dim": len(FEATURES), "action_dim": ACTION_DIM, "horizon": HORIZON, "instructions": instructions,
              "width": WIDTH, "blocks": 1, "kind": "residual", "time_features": TIME, "flow_steps": 3,
              "noise_scale": 1.0}  # fmt: skip
    (folder / "architecture.json").write_text(json.dumps({"format": 1, "policy": policy, "normaliser": "0" * 64}))
    return folder


class Deployment:
    """One home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.plane: Plane = open_plane(home)
        self.publisher = PolicyPublisher(self.plane.catalog, self.plane.objects, create_keys(home / "keys"))

    def publish(self, seed: int = 0) -> int:
        return self.publisher.publish(scene_bundle(self.home / "export", seed))

    def coordinate(self) -> None:
        """Put everything committed into snapshots."""
        plane = self.plane
        coordinator = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [])
        while coordinator.step():
            pass
        coordinator.lease.release()

    def coordinate_until(self, stop: threading.Event) -> threading.Thread:
        """A coordinator beside the test, until `stop`."""
        plane = open_plane(self.home)
        coordinator = Coordinator(plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [])
        thread = threading.Thread(target=coordinator.run, args=(stop, 0.02))
        thread.start()
        return thread

    def episodes(self) -> list[Episode]:
        """The members of the latest snapshot, in the order in which their robots ran them."""
        snapshots = self.plane.snapshots
        members = snapshots.episodes(snapshots.latest().version)
        found = [decode(self.plane.objects.get(member.key)) for member in members]
        return sorted(found, key=lambda episode: (episode.robot_id, episode.extra["number"]))
