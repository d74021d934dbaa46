"""Contracts are read as they stand, and a typo is refused with the file, the line and the nearest valid name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_contracts.contract import FOLDER, NAMES, load_contract
from data_contracts.rules import FIELDS, FITS, KINDS, PARAMETERS, problem
from infra.errors import ConfigError
from infra.fleet.tasks import TASKS


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of copies that LWD_CONTRACTS points to."""
    folder = tmp_path / "contracts"
    shutil.copytree(FOLDER, folder)
    monkeypatch.setenv("LWD_CONTRACTS", str(folder))
    return folder


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("name", NAMES)
def test_packaged_contracts_are_valid(name: str) -> None:
    contract = load_contract(name)
    assert contract.rules and contract.fields and contract.owner
    assert all(rule.owner and rule.description and rule.severity in ("block", "warn") for rule in contract.rules)


def test_episode_contract_includes_the_transition() -> None:
    ids = {rule.id for rule in load_contract("episode").rules}
    assert {rule.id for rule in load_contract("transition").rules} < ids


def test_tasks_are_those_of_the_fleet() -> None:
    tasks = load_contract("episode").tasks
    assert {key: (one.instruction, one.substeps, one.max_steps) for key, one in tasks.items()} == {
        key: (one.instruction, len(one.steps), one.limit) for key, one in TASKS.items()
    }


def test_edited_copy_goes_before_the_packaged_one(edited: Path) -> None:
    edit(edited / "transition.odcs.yaml", "max: 1, tolerance", "max: 0.5, tolerance")
    assert load_contract("episode").rule("action-limits").parameters["max"] == 0.5
    (edited / "transition.odcs.yaml").unlink()
    assert load_contract("episode").rule("action-limits").parameters["max"] == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "problem", "nearest"),
    [
        (
            "episode",
            "    quality:\n      - id: episode-schema",
            "    qualty:\n      - id: episode-schema",
            "qualty",
            "quality",
        ),
        ("episode", "check: pattern, pattern", "check: patern, pattern", "patern", "'pattern'"),
        ("episode", "severity: warn", "severity: warning", "warning", "warn"),
        ("episode", "[demo, rollout, play, online]}", "[demo, rollout, play, online], vals: 1}", "vals", "values"),
        ("episode", "{demo: [success]}", "{dmo: [success]}", "dmo", "demo"),
        ("episode", "property: includes", "property: include", "include", "includes"),
        ("episode", "max_steps: 80", "maxsteps: 80", "maxsteps", "max_steps"),
        ("episode", "max_steps: 80", "max_steps: many", "max_steps", "int"),
        ("episode", "property: owner, value: data-stewardship", "property: ownr, value: x", "no owner", "owner"),
        ("episode", r"'\A[0-9a-f]{32}\Z'", "'[0-9'", "episode-id-pattern", "regular expression"),
        ("episode", "id: source-allowed", "id: outcome-allowed", "outcome-allowed", "id of its own"),
        ("episode", "- name: robot_id", "- name: robotid", "robotid", "robot_id"),
        ("episode", "check: schema}", "check: unique}", "schema", "schema rule"),
        ("episode", "name: episode\n", "name: epsode\n", "epsode", "episode"),
        ("episode", "type: custom", "type: sql", "cannot be run", "custom"),
        ("transition", "check: range, min: -1, max: 1,", "check: range, minimum: -1, max: 1,", "minimum", "min"),
        ("transition", "min: -1000, max: 1000", "min: 1000, max: -1000", "above", "exchange"),
        ("transition", "of: mean, nominal: 0.05, ", "of: mean, ", "nominal", "add nominal"),
        ("transition", "min: -1000", "min: low", "low", "float"),
        ("transition", "value: 5", "value: five", "five", "whole number"),
        ("transition", "physicalName: rewards", "physicalName: reward", "reward", "rewards"),
        ("offline_buffer", "by: [task], sources", "by: [tsk], sources", "tsk", "task"),
        ("transition", "min: -1000, max", "min: .nan, max", "nan", "finite number"),
        ("episode", "outcomes: {demo: [success]}", "outcomes: {demo: success}", "demo is 'success'", "list some of"),
        ("episode", "outcomes: {demo: [success]}", "outcomes: {demo: [sucess]}", "sucess", "success"),
        ("episode", "{check: allowed, values: [1]}", "{check: allowed, values: ['1']}", "'1'", "whole number"),
        ("episode", "values: [demo, rollout, play, online]", "values: [demo, 1]", "1", "words"),
        ("episode", "values: [0, 0.5, 1]", "values: []", "[]", "numbers"),
        ("episode", "required: true", "required: false", "episode_id", "required: true"),
        ("offline_buffer", "check: fraction", "check: range", "range", "fraction"),
        ("offline_buffer", "domain: robot-learning", "domain: [", "not YAML", "fix the file"),
    ],
)
def test_typo_is_refused(edited: Path, file: str, old: str, new: str, problem: str, nearest: str) -> None:
    path = edited / f"{file}.odcs.yaml"
    edit(path, old, new)
    with pytest.raises(ConfigError) as caught:
        load_contract(file)
    assert str(path) in caught.value.problem
    assert problem in caught.value.problem
    assert nearest in caught.value.fix
    assert caught.value.exit_code != 0


RULE_TWICE = """        quality:
          - {id: action-wide, description: d, type: custom, engine: lwd, severity: warn,
             customProperties: [{property: owner, value: x}], implementation: {check: range, min: -5, max: 5}}
"""


def test_a_key_that_stands_twice_is_refused_with_its_line(edited: Path) -> None:
    path = edited / "transition.odcs.yaml"
    lines = path.read_text().splitlines(keepends=True)
    at = max(i for i, line in enumerate(lines) if line == "        quality:\n")
    path.write_text("".join([*lines[:at], *RULE_TWICE.splitlines(keepends=True), *lines[at:]]))
    with pytest.raises(ConfigError, match=rf"transition.odcs.yaml:{at + 4}: the key 'quality' stands twice"):
        load_contract("episode")


@pytest.mark.parametrize(
    ("before", "entry", "problem"),
    [
        ("  - property: includes", "  - {property: includes, value: [transition]}", "'includes' stands twice"),
        (
            "      - name: robot_id",
            "      - {name: robot_id, logicalType: string, required: true}",
            "'robot_id' stands",
        ),
    ],
)
def test_an_entry_that_plays_the_part_of_a_key_stands_once(edited: Path, before: str, entry: str, problem: str) -> None:
    edit(edited / "episode.odcs.yaml", before, f"{entry}\n{before}")
    with pytest.raises(ConfigError, match=problem):
        load_contract("episode")


@pytest.mark.parametrize(
    ("under", "entry", "kept"),
    [
        ("    quality:", "{type: text, description: Robots are calibrated.}", "Robots are calibrated."),
        ("    quality:", "{type: sql, query: select 1, mustBe: 1}", "select 1"),
        ("    quality:", "{metric: nullValues, mustBe: 0}", "nullValues"),
        ("    quality:", "{type: custom, engine: soda, implementation: 'checks: []'}", "checks: []"),
        (
            "customProperties:",
            "{property: catalogUrl, value: 'https://c.example/1'}",
            "catalogUrl: https://c.example/1",
        ),
    ],
)
def test_what_the_standard_allows_and_nothing_here_runs_is_kept(
    edited: Path, under: str, entry: str, kept: str
) -> None:
    rules = load_contract("episode").rules
    indent = " " * (len(under) - len(under.lstrip()) + 2)
    edit(edited / "episode.odcs.yaml", f"{under}\n", f"{under}\n{indent}- {entry}\n")
    contract = load_contract("episode")
    assert contract.rules == rules
    assert [note.text for note in contract.notes] == [kept]


def test_dates_are_taken_and_a_team_may_be_missing(edited: Path) -> None:
    path = edited / "episode.odcs.yaml"
    edit(path, "role: owner,", "role: owner, dateIn: 2026-01-05,")
    assert load_contract("episode").owner == "data-stewardship"
    text = path.read_text()
    path.write_text(text[: text.index("team:")] + text[text.index("customProperties:") :])
    assert load_contract("episode").owner == ""


@pytest.mark.parametrize("new", ["engine: LWD", "engine: lwdd", "engine: soda", "type: library"])
def test_a_rule_of_ours_that_is_mistyped_is_not_passed_over(edited: Path, new: str) -> None:
    path = edited / "episode.odcs.yaml"
    edit(path, "type: custom" if new.startswith("type") else "engine: lwd", new)
    with pytest.raises(ConfigError, match="cannot be run|engine"):
        load_contract("episode")


def test_message_names_the_line(edited: Path) -> None:
    path = edited / "transition.odcs.yaml"
    edit(path, "check: increasing", "check: incresing")
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "incresing" in text)
    with pytest.raises(ConfigError, match=f"transition.odcs.yaml:{line}: .*incresing"):
        load_contract("episode")


def test_unknown_names_are_refused(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'episode'"):
        load_contract("episod")
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_contract("nowhere.yaml")
    (edited / "episode.odcs.yaml").rename(edited / "epsiode.odcs.yaml")
    with pytest.raises(ConfigError, match=r"epsiode(.|\n)*episode.odcs.yaml"):
        load_contract("episode")
    monkeypatch.setenv("LWD_CONTRACTS", str(edited / "absent"))
    with pytest.raises(ConfigError, match="not a folder"):
        load_contract("episode")


_EXAMPLES = {
    "range": {"min": 0},
    "period": {"of": "mean", "nominal": 0.05, "tolerance": 0.01},
    "pattern": {"pattern": "x"},
}


def _example(check: str, field: str) -> dict[str, object]:
    if check == "allowed":
        return {"values": ["x"] if KINDS[field] == "text" else [1]}
    return dict(_EXAMPLES.get(check, {}))


@pytest.mark.parametrize("contract", ["episode", "transition"])
@pytest.mark.parametrize("check", [name for name, (place, _) in PARAMETERS.items() if place == "field"])
def test_a_check_is_taken_on_the_fields_it_fits_and_on_no_other(contract: str, check: str) -> None:
    for field in sorted(FIELDS[contract]):
        wrong = problem(contract, field, check, _example(check, field))
        if field in FITS[check]:
            assert wrong is None
        else:
            assert wrong is not None and check in wrong.problem and field in wrong.problem
            assert all(other in wrong.fix for other in FITS[check])


@pytest.mark.parametrize(
    ("file", "field", "implementation", "fitting"),
    [
        ("episode", "robot_id", "{check: range, min: 0}", "started_at"),
        ("episode", "robot_id", "{check: finite}", "started_at"),
        ("episode", "schema_version", "{check: pattern, pattern: '1'}", "robot_id"),
        ("episode", "started_at", "{check: increasing}", "timestamps"),
        ("transition", "intervention", "{check: finite}", "rewards"),
        ("transition", "reward", "{check: increasing}", "timestamps"),
        ("transition", "action", "{check: allowed, values: [0]}", "rewards"),
        ("transition", "timestamp", "{check: reward_at_end}", "rewards"),
    ],
)
def test_a_check_on_a_field_it_does_not_fit_is_refused(
    edited: Path, file: str, field: str, implementation: str, fitting: str
) -> None:
    path = edited / f"{file}.odcs.yaml"
    rule = (
        "      - {id: misplaced, type: custom, engine: lwd, severity: block, description: d,\n"
        "         customProperties: [{property: owner, value: x}],\n"
        f"         implementation: {implementation}}}\n"
    ).replace("      ", "          ", 1)
    lines = path.read_text().splitlines(keepends=True)
    at = lines.index(f"      - name: {field}\n")
    end = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("      - name:")), len(lines))
    quality = next((i for i in range(at, end) if lines[i] == "        quality:\n"), None)
    if quality is None:
        lines.insert(end, "        quality:\n" + rule)
    else:
        lines.insert(quality + 1, rule)
    path.write_text("".join(lines))
    line = 2 + next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "id: misplaced" in text)
    with pytest.raises(ConfigError) as caught:
        load_contract(file)
    attribute = {"reward": "rewards", "action": "actions", "timestamp": "timestamps"}.get(field, field)
    assert f"{path}:{line}: rule 'misplaced': check " in caught.value.problem
    assert attribute in caught.value.problem
    assert fitting in caught.value.fix


def test_the_order_of_a_schemas_objects_has_no_meaning(edited: Path) -> None:
    other = "schema:\n  - name: other\n    logicalType: object\n    properties: [{name: a, logicalType: date}]\n"
    edit(edited / "episode.odcs.yaml", "schema:\n", other)
    contract = load_contract("episode")
    assert len(contract.rules) == len(load_contract(FOLDER / "episode.odcs.yaml").rules)
    assert ("schema", "object", "other") in [(note.place, note.kind, note.text) for note in contract.notes]


OPEN = "    quality:\n      - {rule: nullCheck, validValues: [a], description: A rule of another tool.}\n"


def test_a_field_of_another_tool_is_kept_where_the_release_allows_it(edited: Path) -> None:
    file = edited / "episode.odcs.yaml"
    edit(file, "    quality:\n", OPEN)
    with pytest.raises(ConfigError, match="unknown field 'validValues'"):
        load_contract("episode")
    edit(file, "apiVersion: v3.1.0", "apiVersion: v3.0.2")
    assert "validValues: ['a']" in [note.text for note in load_contract("episode").notes]
    edit(file, "validValues", "descriptoin")
    with pytest.raises(ConfigError, match="unknown field 'descriptoin'"):
        load_contract("episode")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{property: rows, value: T+1}", "{property: row, value: T+1}", "rows is None"),
        ("{property: rows, value: T+1}", "{property: rows, value: T1}", "rows is 'T1'"),
        ("{property: dimension,", "{property: rows,", "'rows' stands twice"),
        ("physicalType: float32", "physicalType: flaot32", "no type 'flaot32'"),
        ("values: [0, 1]", "values: [0, 1, 1]", "stands twice"),
    ],
)
def test_what_would_refuse_every_episode_or_says_a_thing_twice_is_refused(
    edited: Path, old: str, new: str, message: str
) -> None:
    edit(edited / "transition.odcs.yaml", old, new)
    with pytest.raises(ConfigError, match=message):
        load_contract("episode")


def test_a_tolerance_in_scientific_notation_is_a_number(edited: Path) -> None:
    edit(edited / "transition.odcs.yaml", "tolerance: 0.00001", "tolerance: 1e-5")
    assert load_contract("episode").rule("action-limits").parameters["tolerance"] == 1e-5
