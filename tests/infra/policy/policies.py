"""Small policy bundles and a channel on a fresh home, for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from invariants import Plane, open_plane
from safetensors.numpy import save_file

from infra.policy.channel import CatalogPolicySource, PolicyPublisher
from infra.policy.keys import Signer, TrustStore, create_keys, load_trusted
from infra.policy.registry import Registry
from infra.policy.subscriber import PolicySubscriber


def make_bundle(folder: Path, seed: int = 0) -> Path:
    """A bundle of a few random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"w": np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)}
    save_file(weights, folder / "policy.safetensors")
    (folder / "architecture.json").write_text(json.dumps({"obs_dim": 3, "horizon": 5}))
    return folder


def make_base(path: Path, seed: int = 0) -> Path:
    """A base: the frozen weights that several policies complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"b": np.random.default_rng(seed).normal(size=(64, 32)).astype(np.float32)}, path)
    return path


@dataclass
class Channel:
    """Publisher, registry and robots of one home."""

    home: Path
    plane: Plane = field(init=False)
    signer: Signer = field(init=False)
    trust: TrustStore = field(init=False)

    def __post_init__(self) -> None:
        self.plane = open_plane(self.home)
        self.signer = create_keys(self.home / "keys")
        self.trust = load_trusted(self.home / "keys")
        self.publisher = PolicyPublisher(self.plane.catalog, self.plane.objects, self.signer)
        self.registry = Registry(self.plane.catalog, self.signer, cards=self.home / "cards")
        self.source = CatalogPolicySource(self.plane.catalog, self.plane.objects)

    def publish(self, cohort: str | None = "learning", seed: int | None = None, base: Path | None = None) -> int:
        self._count = getattr(self, "_count", 0) + 1
        bundle = make_bundle(self.home / f"export-{self._count}", self._count if seed is None else seed)
        return self.publisher.publish(bundle, cohort=cohort, base=base)

    def robot(self, name: str = "r0", cohort: str = "learning") -> PolicySubscriber:
        return PolicySubscriber(self.home / "robots" / name, cohort, self.source, self.trust)
