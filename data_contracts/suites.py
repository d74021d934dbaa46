"""A contract's rules over many episodes at once, as Great Expectations suites generated from the same contract.

Great Expectations is imported when a suite first runs (seconds); nothing leaves the machine. Its map expectations pass
over nulls, so that finiteness is expected of a column that counts the values which are not finite.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_contracts.checks import Violation, bounds, default_contract, outside
from data_contracts.contract import Contract
from data_contracts.frames import Frames, composition, frames
from data_contracts.rules import Rule, Severity
from infra.episode import SOURCES, Episode
from infra.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

_COUNTED = {"episodes": "episodes", "fraction": "of all episodes", "success_rate": "successful"}
_STEP_FIELDS = ("observations", "actions", "rewards", "timestamps")


@dataclass(frozen=True)
class RuleResult:
    """What one rule came to. `found` counts the offenders: episodes, or groups of the buffer."""

    rule: str
    contract: str
    severity: Severity
    owner: str
    field: str | None
    description: str
    success: bool
    found: int
    episodes: tuple[str, ...]  # ids of the episodes that break it
    message: str  # empty on success


@dataclass(frozen=True)
class BatchReport:
    """Results of a contract over `n` episodes. `success` means that no rule of severity `block` is broken."""

    contract: str
    n: int
    results: tuple[RuleResult, ...]

    @property
    def success(self) -> bool:
        return not any(violation.severity == "block" for violation in self.violations)

    @property
    def violations(self) -> list[Violation]:
        """One for each broken rule."""
        return [Violation(r.rule, r.severity, r.message, r.owner, r.field) for r in self.results if not r.success]

    def by_episode(self) -> dict[str, list[Violation]]:
        """The violations of each episode that broke a rule."""
        found: dict[str, list[Violation]] = {}
        for one in self.results:
            for episode_id in one.episodes:
                found.setdefault(episode_id, []).append(
                    Violation(one.rule, one.severity, one.message, one.owner, one.field)
                )
        return found


@dataclass(frozen=True)
class _Expected:
    """An expectation, by the name of its class: of which table, for which rule."""

    rule: Rule
    table: str
    kind: str
    arguments: dict[str, Any]
    where: tuple[str, tuple[Any, ...]] | None = None  # a column and the values of the rows that it is about
    elsewhere: bool = False  # about the rows of all other values instead


def validate_batch(contract: Contract, episodes: Sequence[Episode]) -> BatchReport:
    """Check the episodes together against the episode or transition contract. None at all are a success.

    Raises:
        ConfigError: the contract is the buffer's, or Great Expectations could not evaluate a rule.
    """
    _refuse(contract, buffer=False)
    return validate_frames(contract, frames(contract, episodes), len(episodes))


def validate_frames(contract: Contract, tables: Frames, n: int) -> BatchReport:
    """`validate_batch` on tables made before. A column that a rule needs and the table lacks breaks that rule."""
    broken: dict[str, dict[str, str]] = {}  # rule -> episode -> what was found
    missing: dict[str, str] = {}
    for table in ("structure", "episodes", "steps", "substeps"):
        frame = getattr(tables, table)
        expected = []
        for one in (one for rule in contract.rules for one in _expected(rule) if one.table == table):
            lacks = [c for c in ("episode_id", *_columns(one)) if c not in frame.columns]
            if lacks:
                missing[one.rule.id] = f"the table of {table} lacks the column {', '.join(lacks)}"
            elif len(frame):
                expected.append(one)
        for one, found in _evaluate(frame, expected):
            for episode_id, value in found:
                broken.setdefault(one.rule.id, {}).setdefault(episode_id, value)
    results = []
    for rule in contract.rules:
        offenders = broken.get(rule.id, {})
        message = missing.get(rule.id, "")
        if offenders and not message:
            first = next(iter(offenders))
            message = f"{len(offenders)} of {n} episodes break it, the first {first}: {offenders[first]}"
        results.append(_result(rule, tuple(offenders), len(offenders) or int(bool(message)), message))
    return BatchReport(contract.name, n, tuple(results))


def default_batch_check(episodes: Sequence[Episode]) -> dict[str, list[Violation]]:
    """Violations by episode under the contract in force, for the coordinator's micro-batches."""
    return validate_batch(default_contract(), episodes).by_episode()


def validate_buffer(contract: Contract, episodes: Sequence[Episode]) -> BatchReport:
    """Check what the offline buffer holds as a whole: no duplicates, enough of each task and source.

    Raises:
        ConfigError: the contract is not the buffer's.
    """
    _refuse(contract, buffer=True)
    table = composition(episodes)
    results = []
    for rule in contract.rules:
        if rule.check == "unique":
            expected = _Expected(rule, "episodes", "ExpectColumnValuesToBeUnique", {"column": "episode_id"})
            twice = dict(found for _, rows in _evaluate(table, [expected]) for found in rows) if len(table) else {}
            message = f"{len(twice)} episodes are there more than once, the first {next(iter(twice))}" if twice else ""
            results.append(_result(rule, tuple(twice), len(twice), message))
            continue
        groups = _groups(rule, table)
        low, high = bounds(rule)
        arguments = {"column": "value", "min_value": low, "max_value": high}
        expected = _Expected(rule, "groups", "ExpectColumnValuesToBeBetween", arguments)
        # the index of this table is the group, and what is found is its value
        found = [pair for _, rows in _evaluate(groups, [expected]) for pair in rows] if len(groups) else []
        listed = "; ".join(f"{group}: {float(value):.4g} {_COUNTED[rule.check]}" for group, value in found[:6])
        more = f" and {len(found) - 6} more groups" if len(found) > 6 else ""
        message = f"{listed}{more}; {outside(low, high)}" if found else ""
        results.append(_result(rule, (), len(found), message))
    return BatchReport(contract.name, len(episodes), tuple(results))


def _refuse(contract: Contract, *, buffer: bool) -> None:
    if (contract.name == "offline_buffer") != buffer:
        right = "offline_buffer" if buffer else "episode"
        raise ConfigError(f"contract {contract.name!r} cannot check this", f"load the contract {right!r}")


def _result(rule: Rule, episodes: tuple[str, ...], found: int, message: str) -> RuleResult:
    return RuleResult(
        rule=rule.id,
        contract=rule.contract,
        severity=rule.severity,
        owner=rule.owner,
        field=rule.field,
        description=rule.description,
        success=not message,
        found=found,
        episodes=episodes,
        message=message,
    )


def _groups(rule: Rule, table: pd.DataFrame) -> pd.DataFrame:
    """A row per group with its value. Tasks are those of the buffer; sources the rule's, present or not."""
    import pandas as pd

    by, sources = rule.parameters.get("by", []), rule.parameters.get("sources")
    chosen = table if sources is None else table[table["source"].isin(sources)]
    if rule.check == "success_rate":
        rows = [(", ".join(sources or SOURCES), float((chosen["outcome"] == "success").mean()))] if len(chosen) else []
        return pd.DataFrame(rows, columns=["episode_id", "value"])
    tasks = sorted(set(table["task"])) if "task" in by else [None]
    names: list[str | None] = list(sources or SOURCES) if "source" in by else [None]
    rows = []
    for task in tasks:
        for source in names:
            picked = chosen if task is None else chosen[chosen["task"] == task]
            picked = picked if source is None else picked[picked["source"] == source]
            value = float(len(picked)) if rule.check == "episodes" else len(picked) / max(1, len(table))
            label = " ".join(text for text in (task, source) if text) or ", ".join(sources or ["the buffer"])
            if "task" in by and sources and "source" not in by:
                label += f" {', '.join(sources)}"
            rows.append((label, value))
    return pd.DataFrame(rows, columns=["episode_id", "value"])


def _columns(expected: _Expected) -> list[str]:
    names = [expected.arguments[key] for key in ("column", "column_A", "column_B") if key in expected.arguments]
    return names + ([expected.where[0]] if expected.where else [])


def _expected(rule: Rule) -> Iterable[_Expected]:
    """The expectations that a rule amounts to."""
    given, field = rule.parameters, str(rule.field)
    between, in_set = "ExpectColumnValuesToBeBetween", "ExpectColumnValuesToBeInSet"
    pair: dict[str, Any]
    arguments: dict[str, Any]
    equal, ignore = "ExpectColumnPairValuesToBeEqual", {"ignore_row_if": "either_value_is_missing"}
    if rule.check == "schema":
        pair = {"column_A": "found", "column_B": "wanted", **ignore}
        yield _Expected(rule, "structure", equal, pair, where=("contract", (rule.contract,)))
    elif rule.check == "unique":
        yield _Expected(rule, "episodes", "ExpectColumnValuesToBeUnique", {"column": "episode_id"})
    elif rule.check == "finite":
        table = "steps" if field in _STEP_FIELDS else "substeps" if field == "substep_scores" else "episodes"
        yield _Expected(rule, table, between, {"column": f"{field}_not_finite", "min_value": 0, "max_value": 0})
    elif rule.check == "range":
        low, high = bounds(rule)
        if field in _STEP_FIELDS:
            if low is not None:
                yield _Expected(rule, "steps", between, {"column": f"{field}_min", "min_value": low})
            if high is not None:
                yield _Expected(rule, "steps", between, {"column": f"{field}_max", "max_value": high})
        else:
            table = "substeps" if field == "substep_scores" else "episodes"
            yield _Expected(rule, table, between, {"column": field, "min_value": low, "max_value": high})
    elif rule.check == "allowed":
        table = "substeps" if field == "substep_scores" else "steps" if field in _STEP_FIELDS else "episodes"
        column = f"{field}_min" if table == "steps" else field  # of one column: its least is its value
        yield _Expected(rule, table, in_set, {"column": column, "value_set": list(given["values"])})
    elif rule.check == "pattern":
        yield _Expected(
            rule, "episodes", "ExpectColumnValuesToMatchRegex", {"column": field, "regex": given["pattern"]}
        )
    elif rule.check == "increasing":
        yield _Expected(rule, "steps", between, {"column": "period", "min_value": 0, "strict_min": True})
    elif rule.check == "starts_at_zero":
        low, high = bounds(rule)
        yield _Expected(rule, "episodes", between, {"column": f"{field}_first", "min_value": low, "max_value": high})
    elif rule.check == "changes":
        yield _Expected(rule, "episodes", between, {"column": f"{field}_changes", "min_value": 1})
    elif rule.check == "period":
        table, column = ("episodes", "mean_period") if given["of"] == "mean" else ("steps", "period")
        low, high = bounds(rule)
        yield _Expected(rule, table, between, {"column": column, "min_value": low, "max_value": high})
    elif rule.check == "reward_at_end":
        arguments = {"column": "rewards_min", "value_set": [0]}
        yield _Expected(rule, "steps", in_set, arguments, where=("before_last", (True,)))
    elif rule.check == "intervention_by_source":
        arguments = {"column": "interventions", "max_value": 0}
        yield _Expected(rule, "episodes", between, arguments, where=("source", tuple(given["never"])))
    elif rule.check == "instruction_of_task":
        yield _Expected(rule, "episodes", equal, {"column_A": "instruction", "column_B": "instruction_wanted"})
    elif rule.check == "steps_of_task":
        pair = {"column_A": "max_steps", "column_B": "steps", "or_equal": True, **ignore}
        yield _Expected(rule, "episodes", "ExpectColumnPairValuesAToBeGreaterThanB", pair)
    elif rule.check == "substeps_of_task":
        pair = {"column_A": "substeps", "column_B": "substeps_wanted", **ignore}
        yield _Expected(rule, "episodes", equal, pair)
    elif rule.check == "outcome_by_source":
        for source, outcomes in given["outcomes"].items():
            arguments = {"column": "outcome", "value_set": list(outcomes)}
            yield _Expected(rule, "episodes", in_set, arguments, where=("source", (source,)))
    elif rule.check == "outcome_reward":
        one = {"column": "last_reward", "value_set": [1]}
        yield _Expected(rule, "episodes", in_set, one, where=("outcome", ("success",)))
        kind = "ExpectColumnValuesToNotBeInSet"
        yield _Expected(rule, "episodes", kind, one, where=("outcome", ("success",)), elsewhere=True)
    elif rule.check == "policy_version_by_source":
        for key, kind in (("required", "ExpectColumnValuesToNotBeNull"), ("forbidden", "ExpectColumnValuesToBeNull")):
            if sources := given.get(key):
                yield _Expected(rule, "episodes", kind, {"column": "policy_version"}, where=("source", tuple(sources)))


@functools.cache
def _great_expectations() -> tuple[Any, Any]:
    """Great Expectations and an in-memory context of it: no telemetry, no progress bars, no files."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"  # read when the package is imported
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    import great_expectations as gx

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.ERROR)  # it sets its own
    context = gx.get_context(mode="ephemeral")
    bars: Any = {"globally": False, "metric_calculations": False}
    context.variables.progress_bars = bars
    return gx, context


def _evaluate(frame: pd.DataFrame, expected: Sequence[_Expected]) -> Iterable[tuple[_Expected, list[tuple[str, str]]]]:
    """For each expectation that failed: the episodes that break it, with what was found."""
    if not expected:
        return []
    gx, context = _great_expectations()
    source = context.data_sources.add_or_update_pandas("episodes")
    definition = source.add_dataframe_asset("table").add_batch_definition_whole_dataframe("all")
    expectations = []
    for number, one in enumerate(expected):
        arguments = {key: value for key, value in one.arguments.items() if value is not None}
        if one.where is not None:
            column, values = one.where
            arguments["row_condition"] = (
                " and ".join(f"{column} != {value!r}" for value in values)
                if one.elsewhere
                else " or ".join(f"{column} == {value!r}" for value in values)
            )
            arguments["condition_parser"] = "pandas"
        expectations.append(getattr(gx.expectations, one.kind)(**arguments, meta={"number": number}))
    suite = gx.ExpectationSuite(name="contract", expectations=expectations)
    form = {"result_format": "COMPLETE", "unexpected_index_column_names": ["episode_id"]}
    outcome = definition.get_batch({"dataframe": frame}).validate(suite, result_format=form)
    failed = []
    for result in outcome.results:
        one = expected[result.expectation_config.meta["number"]]
        details = result.exception_info or {}
        if details.get("raised_exception", True):
            raise ConfigError(f"rule {one.rule.id!r} cannot be evaluated: {details}", "mend the rule's parameters")
        if not result.success:
            failed.append((one, [_offender(one, row) for row in result.result.get("unexpected_index_list") or []]))
    return failed


def _offender(expected: _Expected, row: dict[str, Any]) -> tuple[str, str]:
    episode_id = str(row["episode_id"])
    values = {name: value for name, value in row.items() if name != "episode_id"}
    if expected.table == "groups":
        return episode_id, str(values["value"])
    return episode_id, ", ".join(f"{name} = {value}" for name, value in values.items()) or "episode_id repeated"
