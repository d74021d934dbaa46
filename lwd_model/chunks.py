"""Replay of action chunks: every start of every episode is one training sample, the last chunks padded and masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from infra.episode import Episode
from infra.errors import ConfigError, ConflictError
from lwd_model.returns import Takeover, TimeLimit, discounted_return, nstep_fields

Padding = Literal["repeat", "zeros"]
Cloned = Literal["all", "successes"]
EVERYTHING = slice(None)


@dataclass(frozen=True)
class Batch:
    """B samples. D observation and A action dimensions, chunks of H steps.

    Attributes:
        obs: (B, D) float32 at the start; next_obs: (B, D) where the window ends (bootstrap state).
        task: (B,) int64, index of the instruction.
        actions: (B, H, A) float32, as executed; mask: (B, H) bool, True where real.
        reward, discount: (B,) float32, see `returns.Fields`.
        mc_return: (B,) float32, discounted return to the end of the episode.
        intervention: (B,) bool, an operator acted at the start.
        clone_weight: (B,) float32, 1 where behaviour cloning is to imitate the sample, else 0.
        index: (B,) int64, the sample's place in its replay.
        online: (B,) bool, the sample comes from the online replay of `mixed_sample`.
    """

    obs: Tensor
    next_obs: Tensor
    task: Tensor
    actions: Tensor
    mask: Tensor
    reward: Tensor
    discount: Tensor
    mc_return: Tensor
    intervention: Tensor
    clone_weight: Tensor
    index: Tensor
    online: Tensor

    def __len__(self) -> int:
        return self.obs.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The samples `rows`, for example the first 64 for the policy."""
        return Batch(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class Replay:
    """Many episodes in contiguous arrays, with their n-step fields precomputed.

    Holds no random state: samples depend on the contents and on the generator passed in, so a resumed run that adds the
    same episodes in the same order draws the same batches. Adding costs amortised O(T); removing an episode compacts
    the arrays, O(everything), and keeps the order.

    Args:
        instructions: the policy's instructions; a sample's task is an index into them.
        horizon: H.
        gamma, time_limit, takeover: see `returns.nstep_fields`. Unless takeover is `continue`, chunks are masked from
            the boundary on as well: the operator's actions must not be blamed for the robot's failure.
        padding: `repeat` the last real action, or `zeros` for delta control.
        cloned: `successes` clones demonstrations that succeed, takeovers, and autonomous steps that lead to success
            without a further takeover; `all` clones everything.
    """

    def __init__(
        self,
        instructions: Sequence[str],
        horizon: int,
        gamma: float,
        *,
        time_limit: TimeLimit = "failure",
        takeover: Takeover = "continue",
        padding: Padding = "repeat",
        cloned: Cloned = "successes",
    ) -> None:
        if padding not in get_args(Padding) or cloned not in get_args(Cloned):
            raise ConfigError(
                f"padding={padding!r}, cloned={cloned!r}: unknown option",
                f"use padding in {get_args(Padding)} and cloned in {get_args(Cloned)}",
            )
        self.instructions = tuple(instructions)
        self.horizon, self.gamma = horizon, gamma
        self.time_limit, self.takeover, self.padding, self.cloned = time_limit, takeover, padding, cloned
        self._tasks = {instruction: i for i, instruction in enumerate(self.instructions)}
        self._steps: dict[str, int] = {}  # episode id -> T, in order of arrival
        self._obs = _Column()  # T+1 rows an episode
        self._columns: dict[str, _Column] = {}  # T rows an episode
        self._views: dict[str, npt.NDArray[np.int64]] = {}  # lazily built lists of starts
        self._offsets = np.arange(horizon)

    def __len__(self) -> int:
        """Number of samples (starts)."""
        return len(self._columns["task"]) if self._columns else 0

    def __contains__(self, episode_id: str) -> bool:
        return episode_id in self._steps

    @property
    def episodes(self) -> tuple[str, ...]:
        """Ids of the episodes held, in order of arrival."""
        return tuple(self._steps)

    def add(self, episode: Episode, nstep: int = 1) -> None:
        """Append an episode's T samples, with windows of `nstep` chunks.

        Raises:
            ConfigError: its instruction is not one of the policy's, or its arrays' dimensions differ from the others'.
            ConflictError: an episode of this id is here already.
        """
        if episode.episode_id in self._steps:
            raise ConflictError(
                f"episode {episode.episode_id} is in the replay already", "remove it first, or skip what is contained"
            )
        if episode.instruction not in self._tasks:
            raise ConfigError(
                f"episode {episode.episode_id}: instruction {episode.instruction!r} is unknown to the policy",
                f"add it to the configuration's instructions; known: {', '.join(map(repr, self.instructions))}",
            )
        steps = episode.steps
        if episode.observations.shape[0] != steps + 1:
            raise ConfigError(
                f"episode {episode.episode_id} has {episode.observations.shape[0]} observations for {steps} actions",
                "record the observation after the last action too",
            )
        held = self._columns.get("actions")
        if held is not None and (
            held.data.shape[1:] != episode.actions.shape[1:]
            or self._obs.data.shape[1:] != episode.observations.shape[1:]
        ):
            raise ConfigError(
                f"episode {episode.episode_id}: {episode.observations.shape[1]}-D observations and "
                f"{episode.actions.shape[1]}-D actions do not match the replay's",
                "keep one embodiment per replay",
            )
        window = nstep_fields(
            episode.rewards, episode.intervention, episode.outcome, self.horizon, nstep, self.gamma,
            self.time_limit, self.takeover,
        )  # fmt: skip
        starts = np.arange(steps)
        rows: dict[str, npt.NDArray[Any]] = {
            "actions": episode.actions.astype(np.float32, copy=False),
            "task": np.full(steps, self._tasks[episode.instruction], np.int64),
            "ordinal": np.full(steps, len(self._steps), np.int64),
            "real": np.minimum(self.horizon, window.bootstrap_index - starts),
            "length": window.bootstrap_index - starts,
            "reward": window.reward.astype(np.float32),
            "discount": window.discount.astype(np.float32),
            "mc_return": discounted_return(episode.rewards, self.gamma).astype(np.float32),
            "intervention": episode.intervention.astype(bool, copy=False),
            "clone_weight": self._clone_weight(episode),
        }
        for name, values in rows.items():
            self._columns.setdefault(name, _Column()).extend(values)
        self._obs.extend(episode.observations.astype(np.float32, copy=False))
        self._steps[episode.episode_id] = steps
        self._views.clear()

    def remove(self, episode_id: str) -> bool:
        """Forget an episode (a revocation). True where it was here."""
        if episode_id not in self._steps:
            return False
        order = list(self._steps)
        place = order.index(episode_id)
        first = sum(self._steps[name] for name in order[:place])
        steps = self._steps.pop(episode_id)
        for column in self._columns.values():
            column.cut(first, first + steps)
        self._obs.cut(first + place, first + place + steps + 1)
        self._columns["ordinal"].data[first:] -= 1
        self._views.clear()
        return True

    def sample(
        self,
        batch: int,
        rng: np.random.Generator,
        *,
        balanced: bool = False,
        cloned_only: bool = False,
        part: slice = EVERYTHING,
    ) -> Batch:
        """Draw `batch` samples with replacement, uniformly over starts.

        Args:
            balanced: uniform over the tasks present, then over a task's starts.
            cloned_only: among the samples of positive clone weight only.
            part: which of the drawn samples are wanted, contiguous (`Ranks.part`). The draw is the same for each part:
                parts taken with generators of the same state are cut from one batch.

        Raises:
            ConfigError: nothing to draw from.
        """
        return self._gather(self._draw(batch, rng, balanced, cloned_only)[part])

    def owners(self, index: Tensor) -> set[str]:
        """The episodes that samples come from, by their places (`Batch.index`)."""
        ids = self.episodes
        return (
            {ids[ordinal] for ordinal in np.unique(self._columns["ordinal"].data[index.numpy()])}
            if len(index)
            else set()
        )

    def has_samples(self, cloned_only: bool = False) -> bool:
        """Whether there is anything to draw from."""
        return len(self._view(True)[0]) > 0 if cloned_only else len(self) > 0

    def _draw(self, batch: int, rng: np.random.Generator, balanced: bool, cloned_only: bool) -> npt.NDArray[np.int64]:
        if not balanced and not cloned_only:
            if not len(self):
                raise ConfigError("the replay is empty", "add episodes before sampling")
            return rng.integers(0, len(self), batch)
        starts, bounds = self._view(cloned_only)
        if not len(starts):
            raise ConfigError("the replay has nothing to draw from", "add episodes, or clone with cloned='all'")
        if not balanced:
            return starts[rng.integers(0, len(starts), batch)]
        group = rng.integers(0, len(bounds) - 1, batch)
        return starts[rng.integers(bounds[group], bounds[group + 1])]

    def _view(self, cloned_only: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Starts sorted by task, and the bounds of each present task's run among them."""
        name = "cloned" if cloned_only else "all"
        if name not in self._views:
            starts = np.arange(len(self))
            if not self._columns:
                return starts, np.zeros(1, np.int64)
            if cloned_only:
                starts = starts[self._columns["clone_weight"].data > 0]
            task = self._columns["task"].data[starts]
            self._views[name] = starts[np.argsort(task.astype(np.int16), kind="stable")]
            self._views[name + ".bounds"] = np.append(0, np.cumsum(np.unique(task, return_counts=True)[1]))
        return self._views[name], self._views[name + ".bounds"]

    def _gather(self, index: npt.NDArray[np.int64]) -> Batch:
        column = {name: c.data for name, c in self._columns.items()}
        real = column["real"][index]
        mask = self._offsets < real[:, None]
        actions = column["actions"][index[:, None] + np.minimum(self._offsets, real[:, None] - 1)]
        if self.padding == "zeros":
            actions[~mask] = 0.0
        row = index + column["ordinal"][index]  # an episode has one observation more than actions
        arrays: dict[str, npt.NDArray[Any]] = {
            "obs": self._obs.data[row],
            "next_obs": self._obs.data[row + column["length"][index]],
            "actions": actions,
            "mask": mask,
            "index": index,
            "online": np.zeros(len(index), bool),
        }
        for name in ("task", "reward", "discount", "mc_return", "intervention", "clone_weight"):
            arrays[name] = column[name][index]
        return Batch(**{name: torch.from_numpy(values) for name, values in arrays.items()})

    def _clone_weight(self, episode: Episode) -> npt.NDArray[np.float32]:
        if self.cloned == "all":
            return np.ones(episode.steps, np.float32)
        if episode.source == "demo":
            return np.full(episode.steps, float(episode.success), np.float32)
        weight = episode.intervention.astype(np.float32)
        if episode.success:
            # Autonomous steps count from the last hand-back on: before a takeover they led nowhere.
            operated = np.flatnonzero(episode.intervention)
            weight[operated[-1] + 1 if len(operated) else 0 :] = 1.0
        return weight


class _Column:
    """Rows of one array in a block that doubles when full; `data` is the filled part."""

    def __init__(self) -> None:
        self._block: npt.NDArray[Any] | None = None
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    @property
    def data(self) -> npt.NDArray[Any]:
        assert self._block is not None  # filled by the first extend()
        return self._block[: self._rows]

    def extend(self, rows: npt.NDArray[Any]) -> None:
        wanted = self._rows + len(rows)
        if self._block is None or wanted > len(self._block):
            block = np.empty((max(wanted, 2 * self._rows, 1024), *rows.shape[1:]), rows.dtype)
            if self._block is not None:
                block[: self._rows] = self.data
            self._block = block
        self._block[self._rows : wanted] = rows
        self._rows = wanted

    def cut(self, first: int, last: int) -> None:
        assert self._block is not None
        tail = self._block[last : self._rows].copy()
        self._block[first : first + len(tail)] = tail
        self._rows -= last - first


def mixed_sample(
    offline: Replay,
    online: Replay,
    batch: int,
    rng: np.random.Generator,
    online_fraction: float = 0.5,
    *,
    balanced: bool = False,
    cloned_only: bool = False,
    part: slice = EVERYTHING,
) -> Batch:
    """A batch of which exactly round(online_fraction · batch) samples are online (1:1 in the paper).

    Offline samples come first. While one replay has nothing to draw from, the other gives the whole batch. With `part`,
    only those of the batch's samples are gathered (see `Replay.sample`): the batch itself depends on the generator's
    state and on the replays' contents alone, whatever the number of ranks that share it.

    Raises:
        ConfigError: both are empty, or the fraction is not within [0, 1].
    """
    if not 0.0 <= online_fraction <= 1.0:
        raise ConfigError(f"online_fraction={online_fraction} is not within [0, 1]", "0.5 is the paper's")
    count = round(online_fraction * batch)
    if not online.has_samples(cloned_only):
        count = 0
    elif not offline.has_samples(cloned_only):
        count = batch
    if count == 0:
        return offline.sample(batch, rng, balanced=balanced, cloned_only=cloned_only, part=part)
    first, last, _ = part.indices(batch)
    border = batch - count
    fresh_part = slice(max(first - border, 0), max(last - border, 0))
    fresh = online.sample(count, rng, balanced=balanced, cloned_only=cloned_only, part=fresh_part)
    fresh.online.fill_(True)
    if count == batch:
        return fresh
    old_part = slice(min(first, border), min(last, border))
    old = offline.sample(border, rng, balanced=balanced, cloned_only=cloned_only, part=old_part)
    return Batch(**{f.name: torch.cat([getattr(old, f.name), getattr(fresh, f.name)]) for f in fields(Batch)})
