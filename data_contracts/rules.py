"""What a rule may say: the checks there are, the parameters of each, and the fields that each fits."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.episode import OUTCOMES, SOURCES

Severity = Literal["block", "warn"]
SEVERITIES = ("block", "warn")

# Fields of an episode that a contract may speak of, and what each holds.
KINDS = {
    "episode_id": "text", "robot_id": "text", "task": "text", "instruction": "text", "source": "text",
    "outcome": "text", "policy_version": "whole number", "schema_version": "whole number", "started_at": "number",
    "substep_scores": "scores", "observations": "vectors", "actions": "vectors", "rewards": "rewards",
    "intervention": "flags", "timestamps": "times",
}  # fmt: skip
FIELDS = {
    "episode": {
        "episode_id", "robot_id", "task", "instruction", "source", "outcome", "policy_version", "substep_scores",
        "started_at", "schema_version",
    },
    "transition": {"observations", "actions", "rewards", "intervention", "timestamps"},
    "offline_buffer": {"episode_id", "task", "source", "outcome"},
}  # fmt: skip

_number, _text, _list, _map = (int, float), (str,), (list,), (dict,)
# check -> where it may stand ("field": on a property, "object": on the whole) and its parameters; True = required.
PARAMETERS: dict[str, tuple[str, dict[str, tuple[Any, bool]]]] = {
    "schema": ("object", {}),
    "unique": ("object", {}),
    "finite": ("field", {}),
    "range": ("field", {"min": (_number, False), "max": (_number, False), "tolerance": (_number, False)}),
    "allowed": ("field", {"values": (_list, True)}),
    "pattern": ("field", {"pattern": (_text, True)}),
    "increasing": ("field", {}),
    "starts_at_zero": ("field", {"tolerance": (_number, False)}),
    "changes": ("field", {}),
    "period": ("field", {"of": (_text, True), "nominal": (_number, True), "tolerance": (_number, True)}),
    "reward_at_end": ("field", {}),
    "intervention_by_source": ("object", {"never": (_list, True)}),
    "instruction_of_task": ("object", {}),
    "steps_of_task": ("object", {}),
    "substeps_of_task": ("object", {}),
    "outcome_by_source": ("object", {"outcomes": (_map, True)}),
    "outcome_reward": ("object", {}),
    "policy_version_by_source": ("object", {"required": (_list, False), "forbidden": (_list, False)}),
    "episodes": (
        "object",
        {"by": (_list, False), "sources": (_list, False), "min": (_number, False), "max": (_number, False)},
    ),
    "fraction": (
        "object",
        {"by": (_list, True), "sources": (_list, False), "min": (_number, False), "max": (_number, False)},
    ),
    "success_rate": ("object", {"sources": (_list, False), "min": (_number, False), "max": (_number, False)}),
}
# What a field must hold for a check to mean something there.
_FITTING_KINDS = {
    "finite": {"number", "scores", "vectors", "rewards", "times"},
    "range": {"whole number", "number", "scores", "vectors", "rewards", "times"},
    "allowed": {"text", "whole number", "scores", "rewards"},
    "pattern": {"text"},
    "increasing": {"times"},
    "starts_at_zero": {"times"},
    "changes": {"vectors"},
    "period": {"times"},
    "reward_at_end": {"rewards"},
}
FITS = {check: tuple(name for name, kind in KINDS.items() if kind in fit) for check, fit in _FITTING_KINDS.items()}
"""Check on a field -> the fields that it fits."""

_BUFFER_CHECKS = {"unique", "episodes", "fraction", "success_rate"}
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("period", "of"): ("mean", "each"),
    ("episodes", "by"): ("task", "source"),
    ("fraction", "by"): ("task", "source"),
    **{
        (check, parameter): SOURCES
        for check, parameter in (
            ("intervention_by_source", "never"),
            ("policy_version_by_source", "required"),
            ("policy_version_by_source", "forbidden"),
            ("episodes", "sources"),
            ("fraction", "sources"),
            ("success_rate", "sources"),
            ("outcome_by_source", "outcomes"),
        )
    },
}


@dataclass(frozen=True)
class Rule:
    """One quality rule: what is checked, how bad a breach is, and who answers for it.

    `field` is the attribute of the episode it speaks of, or None for the episode or the buffer as a whole.
    """

    id: str
    check: str
    severity: Severity
    owner: str
    description: str
    field: str | None
    parameters: Mapping[str, Any]
    contract: str


@dataclass(frozen=True)
class Wrong:
    """What is wrong with a rule's implementation: below which of its keys, and how to mend it."""

    at: tuple[str, ...]
    problem: str
    fix: str


def nearest(word: str, valid: Iterable[str]) -> str:
    """The nearest valid word for a message, or all of them if none is near."""
    choices = sorted(valid)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return repr(near[0]) if near else "one of " + ", ".join(choices)


def problem(contract: str, field: str | None, check: str, given: Mapping[str, Any]) -> Wrong | None:
    """What keeps a rule of `contract` from being run, or None.

    Args:
        field: the attribute it stands on, None for the whole.
        check: a name of `PARAMETERS`.
        given: its parameters.
    """
    if contract == "offline_buffer":
        valid = _BUFFER_CHECKS if field is None else set()
    else:
        place = "object" if field is None else "field"
        valid = {key for key, (where, _) in PARAMETERS.items() if where == place} - (_BUFFER_CHECKS - {"unique"})
    if check not in valid:
        fix = f"use {nearest(check, valid)}" if valid else "put the rule below the quality of the whole buffer"
        return Wrong(("check",), f"no check {check!r} here", fix)
    if field is not None and field not in FITS[check]:
        where = f"field {field!r}, which holds {KINDS[field]}"
        return Wrong(("check",), f"check {check!r} does not fit {where}", f"put it on {_listed(FITS[check])}")
    known = PARAMETERS[check][1]
    for key, value in given.items():
        if key not in known:
            fix = f"use {nearest(key, known)}" if known else f"{check} takes no parameters; remove it"
            return Wrong((key,), f"unknown parameter {key!r}", fix)
        if wrong := _value(check, key, value, known[key][0], field):
            return wrong
    if missing := [key for key, (_, needed) in known.items() if needed and key not in given]:
        return Wrong((), f"parameter {missing[0]!r} is missing", f"add {missing[0]} to implementation")
    low, high = given.get("min"), given.get("max")
    if "min" in known and low is None and high is None:
        return Wrong((), "has no bound", "add min or max")
    if low is not None and high is not None and low > high:
        return Wrong((), "min is above max", "exchange the two")
    return None


def _value(check: str, key: str, value: Any, kinds: Any, field: str | None) -> Wrong | None:
    """What is wrong with one parameter's value."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        return Wrong((key,), f"{key} is {value!r}", f"give a {kinds[-1].__name__}")
    if isinstance(value, float) and not math.isfinite(value):  # nothing compares with NaN: the rule would pass all
        return Wrong((key,), f"{key} is {value!r}", "give a finite number, or leave it out")
    if choices := _CHOICES.get((check, key)):
        for one in [value] if isinstance(value, str) else value:
            if one not in choices:
                return Wrong((key,), f"no {key} {one!r}", f"use {nearest(str(one), choices)}")
    if isinstance(value, list) and any(one in value[:place] for place, one in enumerate(value)):
        return Wrong((key,), f"an entry of {key} stands twice in {value!r}", "keep one of the two")
    if key == "outcomes":
        for source, outcomes in value.items():
            for one in outcomes if isinstance(outcomes, list) else [outcomes]:
                if not isinstance(outcomes, list) or one not in OUTCOMES:
                    return Wrong((key,), f"{source} is {outcomes!r}", f"list some of {', '.join(OUTCOMES)}")
    if key == "values":
        wanted, word = ((str,), "words") if KINDS[str(field)] == "text" else ((int, float), "numbers")
        if not value or any(not isinstance(one, wanted) or isinstance(one, bool) for one in value):
            return Wrong((key,), f"values are {value!r}", f"list {word}: field {field!r} holds {KINDS[str(field)]}")
    if key == "pattern":
        try:
            re.compile(value)
        except re.error as error:
            return Wrong((key,), str(error), "mend the regular expression")
    return None


def _listed(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
