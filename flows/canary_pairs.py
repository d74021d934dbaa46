"""Which of a candidate's episodes is compared with which of the champion's: concurrent pairs of one task.

Both halves were committed within a window of time, so that what makes the work easier or harder over the day meets both
alike. Who is paired with whom never depends on an outcome.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AtWork:
    """One episode at a robot's real work.

    Attributes:
        task: task key.
        success: reached its goal, nobody taking over.
        intervened: somebody took over.
        candidate: ran by the candidate; else by the champion.
        at: when it was committed, by the catalog's clock, seconds.
        safety: events that the robot's shield counted, by kind.
    """

    task: str
    success: bool
    intervened: bool
    candidate: bool
    at: float = 0.0
    safety: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Candidate minus champion; `since`: when the earlier half was committed."""

    task: str
    success: float
    takeover: float
    since: float


def concurrent(
    task: Sequence[str], candidate: Sequence[bool], at: Sequence[float], window_s: float
) -> list[tuple[int, int]]:
    """(the candidate's episode, the champion's) of each pair, in the order in which both halves were there.

    An episode takes the newest one of the other policy, of its task and not paired yet, that was committed within the
    window; else it waits. Later episodes only add pairs.

    Args:
        task, candidate, at: each episode's, in the order in which they came in; `at` may go back a little.
        window_s: seconds.
    """
    pairs: list[tuple[int, int]] = []
    waiting: dict[tuple[str, bool], deque[int]] = defaultdict(deque)
    for new in range(len(task)):
        others = waiting[task[new], not candidate[new]]
        while others and at[others[0]] < at[new] - window_s:
            others.popleft()
        place = next((k for k in reversed(range(len(others))) if abs(at[others[k]] - at[new]) <= window_s), None)
        if place is None:
            waiting[task[new], candidate[new]].append(new)
            continue
        found = others[place]
        del others[place]
        pairs.append((new, found) if candidate[new] else (found, new))
    return pairs


def concurrent_pairs(episodes: Sequence[AtWork], window_s: float) -> list[Pair]:
    """The pairs of episodes in the order in which they came in."""
    columns = ([e.task for e in episodes], [e.candidate for e in episodes], [e.at for e in episodes])
    return [
        Pair(new.task, float(new.success) - old.success, float(new.intervened) - old.intervened, min(new.at, old.at))
        for new, old in ((episodes[i], episodes[j]) for i, j in concurrent(*columns, window_s))
    ]


def pairs_with_rates(episodes: Sequence[AtWork], success: Mapping[str, float], interventions: float) -> list[Pair]:
    """The candidate's episodes against fixed rates; blind to what the day does to the work.

    Args:
        success: by task; episodes of other tasks are left out.
        interventions: share of episodes with a takeover.
    """
    return [
        Pair(new.task, new.success - success[new.task], new.intervened - interventions, new.at)
        for new in episodes
        if new.candidate and new.task in success
    ]
