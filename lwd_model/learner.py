"""The learner's loop: draws batches, updates the agent, checkpoints bit-exactly. Lightning Fabric gives the device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from infra.errors import ConfigError, CorruptDataError, summary
from lwd_model.agent import LWDAgent
from lwd_model.checkpoint import read_checkpoint, write_checkpoint
from lwd_model.chunks import Batch
from lwd_model.config import AgentConfig, agent_from_dict, to_dict
from lwd_model.divl import unresolved_backup
from lwd_model.normaliser import Normaliser
from lwd_model.precision import compute_dtype
from lwd_model.ranks import Ranks
from lwd_model.support import Support

Sampler = Callable[[np.random.Generator], Batch]
OnStep = Callable[[int, dict[str, float] | None], bool | None]


class Learner:
    """One process that learns.

    Attributes:
        agent: what learns. config: its configuration.
        rng: draws the samples; generator: draws the agent's noise. Both are part of the checkpoint.
        snapshot_version: of the data that the learner has read; None for an offline buffer alone.
        position: the reader's position, JSON values, kept in the checkpoint and never interpreted here.

    Args:
        config, normaliser: see `LWDAgent`.
        seed: of weights, samples and noise.
        accelerator: Fabric's; `auto` takes a GPU where there is one.
        threads: CPU threads to use; 2 or more run value learning and policy extraction side by side.
        dtype: of the trunks; None chooses by what the processor can do.
        ranks: who learns together. All are made and called alike and hold the same state to the bit: one of them saves
            for all, and a checkpoint goes on with any number of ranks. Metrics are of the rank's own samples.
    """

    def __init__(
        self,
        config: AgentConfig,
        normaliser: Normaliser,
        *,
        seed: int = 0,
        accelerator: str = "auto",
        threads: int = 1,
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.seed, self.ranks = config, seed, ranks or Ranks()
        self.fabric = Fabric(accelerator=accelerator, devices=1)
        device = self.fabric.device
        # Two threads' collectives would meet in different orders on different ranks.
        parallel = device.type == "cpu" and threads >= 2 and self.ranks.world == 1
        if device.type == "cpu":
            torch.set_num_threads(max(1, threads // 2 if parallel else threads))
        c = config.learner
        if self.ranks.world > 1:
            self.ranks.part(c.policy_batch)
            if c.batch % c.policy_batch:
                raise ConfigError(
                    f"batch={c.batch} is no multiple of policy_batch={c.policy_batch}",
                    "several ranks spread the policy's states evenly over their samples: choose a multiple",
                )
        for n in {c.n_step_short, c.n_step_long}:
            if c.value_kind == "distributional" and not c.interpolate:
                unresolved_backup(
                    c.gamma,
                    n,
                    config.policy.horizon,
                    Support(config.critic.v_min, config.critic.v_max, config.critic.atoms),
                )
        width = min(config.policy.width, config.critic.width)
        self.agent = LWDAgent(
            config,
            normaliser,
            dtype=dtype or compute_dtype(device, width),
            seed=seed,
            parallel=parallel,
            ranks=self.ranks,
        )
        self.agent.to(device)
        self.agent.reset_optimisers()
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.snapshot_version: int | None = None
        self.position: dict[str, Any] = {}
        self.numbers: dict[str, Tensor] = {}  # metrics of the last update, on its device

    @property
    def updates(self) -> int:
        """RL updates done."""
        return self.agent.counters["rl"]

    def fit(
        self,
        sampler: Sampler,
        updates: int,
        *,
        stage: Literal["sft", "rl"] = "rl",
        cloned: bool = False,
        on_step: OnStep | None = None,
        metrics_every: int = 50,
    ) -> int:
        """Do `updates` more updates of a stage.

        Args:
            sampler: gives the next batch from the learner's numpy generator, for example
                `lambda rng: replay.sample(256, rng)`; with several ranks, `part=ranks.part(256)` of it.
            cloned: in stage `sft`, weigh samples by `clone_weight` (HG-DAgger).
            on_step: called after every update with the stage's update count, and the metrics as floats every
                `metrics_every` updates (else None: fetching them stalls a GPU). Returning True stops.

        Returns:
            Updates done by this call.
        """
        if stage not in self.agent.counters:
            raise ConfigError(f"stage {stage!r} is unknown", "use 'sft' or 'rl'")
        with _denormals_flushed():
            return self._fit(sampler, updates, stage, cloned, on_step, metrics_every)

    def _fit(
        self, sampler: Sampler, updates: int, stage: str, cloned: bool, on_step: OnStep | None, metrics_every: int
    ) -> int:
        for done in range(1, updates + 1):
            batch = sampler(self.rng)
            if self.fabric.device.type != "cpu":
                batch = batch.to(self.fabric.device)
            if stage == "sft":
                weight = batch.clone_weight if cloned else None
                metrics = self.agent.sft_update(batch, self.generator, weight=weight)
            else:
                metrics = self.agent.update(batch, self.generator)
            self.numbers = metrics
            if on_step is not None:
                count = self.agent.counters[stage]
                values = {k: float(v) for k, v in metrics.items()} if count % metrics_every == 0 else None
                if on_step(count, values):
                    return done
        return updates

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `load` goes on bit for bit."""
        write_checkpoint(
            path,
            {
                "architecture": json.dumps(self.config.architecture(), sort_keys=True),
                "config": json.dumps(to_dict(self.config)),
                "agent": self.agent.learner_state(),
                "rng": json.dumps(self.rng.bit_generator.state),
                "generator": self.generator.get_state(),
                "snapshot_version": self.snapshot_version,
                "position": json.dumps(self.position),
                "seed": self.seed,
            },
        )

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; learner options (tau_base, rates, …) stay this learner's own.

        Raises:
            CorruptDataError: no whole checkpoint of this version there. This learner is then part of it: load another.
            ConfigError: it is of another architecture; the message names the first difference.
        """
        state = read_checkpoint(path)
        with _of_this_version(path):
            _same_architecture(json.loads(state["architecture"]), self.config.architecture(), path)
            self.agent.load_learner_state(state["agent"])
            self.rng.bit_generator.state = json.loads(state["rng"])
            self.generator.set_state(state["generator"])
            self.snapshot_version = state["snapshot_version"]
            self.position = dict(json.loads(state["position"]))

    @classmethod
    def resume(cls, path: Path, learner: Mapping[str, Any] | None = None, **options: Any) -> Learner:
        """A learner as its checkpoint describes it, with some learner options overridden."""
        state = read_checkpoint(path)
        with _of_this_version(path):
            data = json.loads(state["config"])
            data["learner"] |= learner or {}
            stats, seed = state["agent"]["normaliser"], int(state["seed"])
            normaliser = Normaliser(stats["mean"].numpy(), stats["std"].numpy())
        made = cls(agent_from_dict(data), normaliser, seed=seed, **options)
        made.load(path)
        return made


@contextmanager
def _of_this_version(path: Path) -> Iterator[None]:
    """CorruptDataError where a checkpoint's digest holds and its content is not what this version writes."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptDataError(
            f"checkpoint {path} is whole, but not of this version ({summary(error)})",
            "go on with the version that wrote it, or train from the start in another folder",
        ) from error


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Denormal numbers are slow and worth nothing to a network; outside of training the processor keeps to IEEE 754."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _same_architecture(saved: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    flat_saved, flat_own = _flatten(saved), _flatten(own)
    for name in sorted(flat_saved.keys() | flat_own.keys()):
        if flat_saved.get(name) != flat_own.get(name):
            raise ConfigError(
                f"checkpoint {path} has {name}={flat_saved.get(name)!r}, this learner {name}={flat_own.get(name)!r}",
                "set the same architecture, or train from the start in another folder",
            )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
