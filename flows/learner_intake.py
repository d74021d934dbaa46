"""The learner's intake: what it cannot learn from is withdrawn by a new snapshot, with the reason, and it goes on.

Every rank refuses the same episodes of an increment; rank 0 withdraws them. A withdrawal that was cut short is done
again when the increment is read again, and changes nothing where it was done already.

A fault of the learner itself would refuse everything, whoever sent it. So the learner stops, and withdraws no more,
when it would refuse more than `IN_A_ROW` episodes for one reason without one taken between them, or more than `SHARE`
of an increment, and these come from more than `ROBOTS` of the deployment's robots. What a minority of robots sends,
however much, is withdrawn and never stops the learner. The count outlives the process.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.episode import Episode
from infra.errors import ConfigError, LwdError
from infra.files import write_durably
from infra.process import patiently
from infra.reader import Increment
from infra.snapshots import Snapshots
from infra.telemetry import metrics
from lwd_model.chunks import Replay
from lwd_model.config import PolicyConfig
from lwd_model.intake import refusal

REFUSALS = "refusals.json"
IN_A_ROW, SHARE, ROBOTS = 10, 0.2, 0.5
_WRITER = "learner"
_log = logging.getLogger("lwd.learner")


class Intake:
    """Brings a replay from one snapshot to the next.

    Args:
        replay: what is filled. policy: what it is filled for.
        nstep: chunks in the TD window of a task.
        snapshots: where rank 0 withdraws; None on the other ranks.
        folder: of the learner; the count of refusals in a row is kept there.
    """

    def __init__(
        self,
        replay: Replay,
        policy: PolicyConfig,
        nstep: Callable[[str], int],
        snapshots: Snapshots | None,
        folder: Path,
    ) -> None:
        self._replay, self._policy, self._nstep = replay, policy, nstep
        self._snapshots, self._file = snapshots, folder / REFUSALS
        self._row: list[dict[str, str]] = _kept(self._file)  # refused since the last episode that was taken

    def take(self, increment: Increment, stop: threading.Event) -> list[Episode]:
        """Take the increment into the replay; returns the episodes taken.

        Raises:
            ConfigError: too many refusals in a row for one reason; the message names it. Nothing more was withdrawn.
        """
        for episode_id in increment.removed:
            self._replay.remove(episode_id)
        taken: list[Episode] = []
        refused: dict[str, tuple[Episode, str, str]] = {}
        for episode in increment.added:
            if (why := self._try(episode)) is None:
                taken.append(episode)
            else:
                refused[episode.episode_id] = (episode, *why)
        if self._snapshots is None:
            return taken
        if taken and self._row:
            self._row = []
            self._file.unlink(missing_ok=True)
        self._not_the_learner(self._snapshots, list(refused.values()), len(increment.added))
        for episode, kind, reason in refused.values():
            self._withdraw(self._snapshots, episode, kind, reason, stop)
        return taken

    def _try(self, episode: Episode) -> tuple[str, str] | None:
        """Add the episode, or say why not; the replay is then as it was."""
        try:
            why = refusal(episode, self._policy)
            if why is None:
                self._replay.add(episode, self._nstep(episode.task))
            return why
        except LwdError as error:
            return type(error).__name__, error.problem
        except Exception as error:  # whatever an episode can provoke is that episode's matter, never the fleet's
            _log.exception("episode %s could not be turned into samples", episode.episode_id)
            return type(error).__name__, f"{type(error).__name__}: {str(error)[:200]}"

    def _not_the_learner(self, snapshots: Snapshots, refused: list[tuple[Episode, str, str]], added: int) -> None:
        """ConfigError where so much of one increment is refused for one reason that the learner may be at fault."""
        for kind in {kind for _, kind, _ in refused}:
            alike = [(episode, reason) for episode, other, reason in refused if other == kind]
            robots = {str(episode.robot_id)[:80] for episode, _ in alike}
            if len(alike) > max(IN_A_ROW, SHARE * added) and _most(robots, snapshots):
                raise ConfigError(
                    f"the learner refused {len(alike)} of {added} episodes of {len(robots)} robots because of their "
                    f"{kind}, for example {alike[0][0].episode_id}: {alike[0][1]}",
                    "see whether the policy or the robots are wrong; none of them was withdrawn",
                )

    def _withdraw(self, snapshots: Snapshots, episode: Episode, kind: str, reason: str, stop: threading.Event) -> None:
        entry = {"id": episode.episode_id, "kind": kind, "robot": str(episode.robot_id)[:80]}
        others = [one for one in self._row if one["id"] != entry["id"]]
        alike = [one for one in others if one["kind"] == kind]
        robots = {one["robot"] for one in alike} | {entry["robot"]}
        if len(alike) >= IN_A_ROW and _most(robots, snapshots):
            raise ConfigError(
                f"the learner refused {len(alike) + 1} episodes in a row because of their {kind}, the last "
                f"{episode.episode_id}: {reason}",
                f"see whether the policy or the robots are wrong; no more is withdrawn. Delete {self._file} to go on",
            )
        self._row = [*others, entry][-4 * IN_A_ROW :]
        write_durably(self._file, json.dumps(self._row, allow_nan=False).encode())
        text = f"the learner cannot take it: {reason}"
        patiently(lambda: snapshots.withdraw([episode.episode_id], reason=text, writer=_WRITER), stop)
        metrics.LEARNER_REFUSED.inc()
        _log.warning("episode %s of %s withdrawn: %s", episode.episode_id, entry["robot"], reason)


def _most(robots: set[str], snapshots: Snapshots) -> bool:
    """Whether these are so many of the deployment's robots that they are no likely cause."""
    return len(robots) > ROBOTS * len(robots | snapshots.robots())


def _kept(path: Path) -> list[dict[str, str]]:
    """The refusals in a row of an earlier life; none where the file is absent or not whole."""
    try:
        rows: Any = json.loads(path.read_text())
        return [{name: str(row[name]) for name in ("id", "kind", "robot")} for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is not whole (%s): counted from zero", path, error)
        return []
