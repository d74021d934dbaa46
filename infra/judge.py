"""One episode's bytes against what was announced and the data contract: the judgement, and never an exception.

What is here runs in the examination's own process (`infra.examination`), or within a test's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra.episode import MAX_REASON_CHARS, MAX_REASONS, Episode, decode
from infra.errors import CorruptDataError, named, shown

log = logging.getLogger(__name__)
_TOLD = ("task", "source", "outcome", "policy_version", "steps")  # of an episode, to the catalog
OUT_OF_MEMORY = "memory budget"  # a rule's id
_MEMORY = "it takes more memory than the setting examine_mib allows"
_MAX_WORD = 64  # characters of a rule's id, of a severity, and of a kind of safety event
_MAX_KINDS = 32  # of safety events that one episode tells of
_MAX_EVENTS = 2**31 - 1  # of one kind
UNREADABLE = "unreadable_safety"
Reason = dict[str, str]


class Violation(Protocol):
    """A broken rule of the data contract; `block` refuses the episode, `warn` is recorded with it."""

    @property
    def rule(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def message(self) -> str: ...


class Announced(Protocol):
    """What the log says of the episode."""

    @property
    def episode_id(self) -> str: ...
    @property
    def robot_id(self) -> str: ...
    @property
    def schema_version(self) -> int: ...
    @property
    def key(self) -> str: ...


Check = Callable[[Episode], Sequence[Violation]]
BatchCheck = Callable[[Sequence[Episode]], Mapping[str, Sequence[Violation]]]


@dataclass(frozen=True)
class Judgement:
    """Refused at `stage` (none: accepted), for which reasons (warnings as well), and what the catalog keeps of it."""

    stage: str = ""
    reasons: list[Reason] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)


def reason(rule: object, severity: object, message: object) -> Reason:
    """A reason as rows, logs and pages may hold it."""
    word = shown(str(severity), _MAX_WORD)
    return {"rule": shown(str(rule), _MAX_WORD), "severity": word, "message": shown(str(message), MAX_REASON_CHARS)}


def reasons_of(violations: Iterable[Violation]) -> list[Reason]:
    """The reasons, at most `MAX_REASONS`: of more than that, those that refuse first, and a count of the rest."""
    found = [(v.rule, v.severity, v.message) for v in violations]
    if len(found) > MAX_REASONS:
        found.sort(key=lambda one: one[1] == "warn")
    kept = [reason(*one) for one in found[:MAX_REASONS]]
    if left := len(found) - len(kept):
        kept[-1] = reason("more", found[MAX_REASONS - 1][1], f"{left + 1} more reasons are not kept")
    return kept


def safety_of(extra: Mapping[str, Any]) -> dict[str, int]:
    """The events that the robot's shield counted, by kind; what is no count of events is one of kind `UNREADABLE`.

    Args:
        extra: the episode's; its `safety` is what a robot wrote, so anything.
    """
    reported = extra.get("safety", {})
    if not isinstance(reported, Mapping):
        return {UNREADABLE: 1}
    counts: dict[str, int] = {}
    unreadable = max(0, len(reported) - _MAX_KINDS)
    for kind, count in sorted(reported.items(), key=lambda item: str(item[0]))[:_MAX_KINDS]:
        readable = isinstance(kind, str) and shown(kind, _MAX_WORD) == kind
        if not readable or type(count) is not int or not 0 <= count <= _MAX_EVENTS:
            unreadable += 1
        elif count:
            counts[kind] = count
    if unreadable:
        counts[UNREADABLE] = min(counts.get(UNREADABLE, 0) + unreadable, _MAX_EVENTS)
    return counts


def refuses(reasons: Iterable[Reason]) -> bool:
    """Whether one of them is more than a warning."""
    return any(one["severity"] != "warn" for one in reasons)


def refused(stage: str, rule: str, message: object) -> Judgement:
    """A refusal of this program's own."""
    return Judgement(stage, [reason(rule, "block", message)])


def judge(data: bytes, event: Announced, check: Check, *, decoded: Callable[[], object] = lambda: None) -> Judgement:
    """Decode the object and hold it against its announcement and the contract.

    Args:
        decoded: called when the bytes are read and the check begins.
    """
    try:
        episode = decode(data, name=event.key)
    except CorruptDataError as error:
        return refused("decode", "format", error.problem)
    except MemoryError:
        return refused("decode", OUT_OF_MEMORY, _MEMORY)
    except Exception as error:  # whatever crafted bytes provoke: the next event must still be read
        return refused("decode", "format", _failure("the reader failed", error))
    for name in ("episode_id", "robot_id", "schema_version"):
        announced, found = getattr(event, name), getattr(episode, name)
        if announced != found:
            return refused("identity", name, f"announced as {named(announced)}, the object says {named(found)}")
    decoded()
    try:
        reasons = reasons_of(check(episode))
        told: dict[str, Any] = {name: getattr(episode, name) for name in _TOLD}
        told["interventions"] = int(episode.intervention.sum())
        if safety := safety_of(episode.extra):
            told["safety"] = safety
    except MemoryError:
        return refused("contract", OUT_OF_MEMORY, _MEMORY)
    except Exception as error:  # a check that breaks accepts nothing; Ingest.release() tries again
        log.exception("check failed on %s", event.episode_id)
        return refused("contract", "check", _failure("the check itself failed", error))
    return Judgement("contract" if refuses(reasons) else "", reasons, told)


def judge_together(objects: Mapping[str, bytes], check: BatchCheck) -> dict[str, list[Reason]]:
    """What the check of several accepted episodes says of each; a check that breaks refuses them all.

    Args:
        objects: the episodes' bytes by id.
    """
    try:
        found = check([decode(data) for data in objects.values()])
        return {name: reasons_of(found.get(name, ())) for name in objects}
    except Exception as error:
        log.exception("batch check failed")
        broken = reason("batch_check", "block", _failure("the check itself failed", error))
        return {name: [broken] for name in objects}


def _failure(what: str, error: Exception) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{what}: {type(error).__name__}: {text}"
