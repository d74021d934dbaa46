"""The learner's way back: which checkpoint is good, and how a learner that fell goes on from it.

A checkpoint is good once `healthy_after` healthy updates followed it. Two are kept: `good.ckpt` and the one before.
`pending.ckpt` waits to become good. A learner that falls goes back, draws other random numbers and says so; after
`falls` falls without a good checkpoint between them it stops.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flows.params import HealthParams
from flows.stages.common import CHECKPOINT, OFFLINE
from infra.errors import DivergedError, LwdError
from infra.telemetry import metrics
from lwd_model.bundle import actions_problem
from lwd_model.checkpoint import exists, previous
from lwd_model.health import Health, HealthLimits, weights_problem
from lwd_model.learner import Learner

GOOD, PENDING = "good.ckpt", "pending.ckpt"
_log = logging.getLogger("lwd.learner")


class Recovery:
    """Judges a learner and brings it back.

    Attributes:
        problem: of the last fall; None once a checkpoint has become good since.

    Args:
        learner: who is judged; its `position["falls"]` counts the falls in a row, over all its lives.
        folder: of its checkpoints, shared by all ranks. Rank 0 alone writes there.
        prove: called before each write there; raises LeaseLostError when another learner owns the folder by now.
    """

    def __init__(
        self, learner: Learner, folder: Path, params: HealthParams, prove: Callable[[], None] = lambda: None
    ) -> None:
        self._learner, self._folder, self._params, self._prove = learner, folder, params, prove
        self._health = Health(HealthLimits(params.loss, params.value, params.gradient, params.ratio, params.floor))
        self._pending_at: int | None = None
        self.problem: str | None = learner.position.get("problem")
        if learner.ranks.rank == 0:
            (folder / PENDING).unlink(missing_ok=True)

    @property
    def falls(self) -> int:
        """In a row."""
        return int(self._learner.position.get("falls", 0))

    def judge(self, row: dict[str, float]) -> str | None:
        """What is wrong with the update, on any rank; the same decision on each."""
        problem = self._health.judge(row)
        return self._agreed(problem)

    def judge_weights(self) -> str | None:
        """What is wrong with the weights, targets and EMAs included, or with the actions of the policy that would be
        deployed; the same decision on each rank."""
        agent, config = self._learner.agent, self._learner.config.policy
        return self._agreed(weights_problem(agent.networks()) or actions_problem(agent.deployed, config))

    def _agreed(self, problem: str | None) -> str | None:
        if not self._learner.ranks.any(problem is not None):
            return None
        return problem or "another rank saw it: its log names the quantity"

    def grow_good(self) -> None:
        """Called before a checkpoint is written, by a healthy learner: a pending one that is old enough is good."""
        if self._pending_at is None or self._learner.updates - self._pending_at < self._params.healthy_after:
            return
        good = self._folder / GOOD
        if good.exists():
            os.replace(good, previous(good))
        os.replace(self._folder / PENDING, good)
        self._pending_at, self.problem = None, None
        self._learner.position |= {"falls": 0, "problem": None}

    def saved(self) -> None:
        """Called after a checkpoint was written: it waits to become good unless another does."""
        if self._pending_at is None:
            (self._folder / PENDING).unlink(missing_ok=True)
            os.link(self._folder / CHECKPOINT, self._folder / PENDING)
            self._pending_at = self._learner.updates

    def _go_back(self) -> Path:
        """Load the checkpoint to go on from; the same one on each rank."""
        good = self._folder / GOOD
        usable = exists(good)
        if usable:
            try:
                self._learner.load(good)
            except (LwdError, OSError) as error:
                usable = False
                _log.error("%s cannot be loaded: %s", good, error)
        if not self._learner.ranks.any(not usable):
            return good
        self._learner.load(OFFLINE / CHECKPOINT)
        return OFFLINE / CHECKPOINT

    def fall(self, problem: str) -> None:
        """Go back to the last good checkpoint, the offline stage's where there is none, with another random draw.

        The data stay those that the learner holds now.

        A good checkpoint that cannot be loaded, for whatever reason, is as none.

        Raises:
            DivergedError: too many falls in a row; the checkpoint left is the good one.
            LeaseLostError: another learner took over; nothing was written.
        """
        learner, fell_at = self._learner, self._learner.updates
        position, snapshot = dict(learner.position), learner.snapshot_version
        falls = self.falls + 1
        source = self._go_back()
        learner.snapshot_version = snapshot
        learner.position = position | {"falls": falls, "problem": problem}
        learner.rng = np.random.default_rng([learner.seed, learner.updates, falls, fell_at])
        learner.generator.manual_seed(int(learner.rng.integers(2**62)))
        self._health.forget()
        self.problem, self._pending_at = problem, None
        metrics.LEARNER_FALLS.inc()
        _log.error("update %d: %s; back to %s, update %d (fall %d)", fell_at, problem, source, learner.updates, falls)
        stop = falls >= self._params.falls
        if stop:  # whoever starts it again may have mended the cause: one more try, then it stops again
            learner.position["falls"] = self._params.falls - 1
        if learner.ranks.rank == 0:
            self._prove()
            (self._folder / PENDING).unlink(missing_ok=True)
            learner.save(self._folder / CHECKPOINT)
        if stop:
            raise DivergedError(
                f"the learner fell {falls} times in a row from {source}, the last time because {problem}",
                "look at learner/training.jsonl and the newest episodes; limits: online.health in params.yaml",
            )
