"""Reads a contract: Open Data Contract Standard YAML in, typed rules out, typos refused.

A quality entry of type `custom` and engine `lwd` is a rule. Its `implementation` names a check of `rules.PARAMETERS`
and that check's parameters; `severity` is `block` (quarantine) or `warn` (reported), and its custom property `owner`
names who answers for it.

What the standard allows and nothing here runs (quality entries in words, in SQL or of other engines, custom properties
of other tools, further objects) is kept as a `Note` for the stewards' page, and passed over; what looks like a mistyped
rule or property of ours is refused.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pydantic
import yaml
from open_data_contract_standard.model import DataQuality, OpenDataContractStandard, SchemaObject, SchemaProperty

from data_contracts.rules import FIELDS, SEVERITIES, Rule, Severity, nearest, problem
from infra.errors import ConfigError
from infra.variables import variable
from infra.yaml_file import parse_yaml, read_text

FOLDER = Path(__file__).parent / "contracts"
ENVIRONMENT = "LWD_CONTRACTS"
SUFFIX = ".odcs.yaml"
NAMES = ("episode", "transition", "offline_buffer")
_LOGICAL_TYPES = ("string", "integer", "number", "boolean", "array", "object")
_QUALITY_TYPES = ("text", "library", "sql", "custom")  # of the standard
_ENGINE = "lwd"
_LIKE = 0.75  # two names that are this similar are one, mistyped
_OPEN = "v3.0."  # releases that let any field stand outside of the schema's objects and properties
_CLOSED = (OpenDataContractStandard, SchemaObject, SchemaProperty)
_ROWS = ("T", "T+1")
_TASK_KEYS = {"key": str, "instruction": str, "substeps": int, "max_steps": int}


@dataclass(frozen=True)
class Field:
    """One column of a contract. `name` is the attribute of `infra.episode.Episode`, `label` the contract's word."""

    name: str
    label: str
    kind: str
    dtype: str
    required: bool
    description: str
    unit: str = ""
    rows: str = ""


@dataclass(frozen=True)
class Note:
    """An entry that the standard allows and nothing here runs: where it stands, what it is, and its text."""

    place: str
    kind: str
    text: str


@dataclass(frozen=True)
class TaskTerms:
    """What the contract agrees on for one task: the instruction, its number of sub-steps and its limit in steps."""

    key: str
    instruction: str
    substeps: int
    max_steps: int


@dataclass(frozen=True)
class Contract:
    """A contract and those it includes, ready for checking. Rules stand in the order of the files."""

    name: str
    version: str
    path: Path
    purpose: str
    owner: str
    fields: tuple[Field, ...]
    rules: tuple[Rule, ...]
    tasks: Mapping[str, TaskTerms]
    action_dim: int
    observation_dim: int | None
    notes: tuple[Note, ...] = ()
    shield: Mapping[str, Any] | None = None

    def rule(self, rule_id: str) -> Rule:
        """The rule of that id; ConfigError naming the nearest one if there is none."""
        for rule in self.rules:
            if rule.id == rule_id:
                return rule
        ids = [rule.id for rule in self.rules]
        raise ConfigError(f"{self.path} has no rule {rule_id!r}", f"use {nearest(rule_id, ids)}")


def contract_path(name_or_path: str | Path) -> Path:
    """Where a contract is: an edited copy in LWD_CONTRACTS goes before the packaged one.

    Raises:
        ConfigError: no such contract or file, LWD_CONTRACTS is no folder, or a file in it has no contract's name.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        if not Path(text).is_file():
            raise ConfigError(f"there is no contract file {text}", "give the path of an .odcs.yaml file")
        return Path(text)
    if text not in NAMES:
        raise ConfigError(f"there is no contract {text!r}", f"use {nearest(text, NAMES)}, or the path of a file")
    if edited := variable(ENVIRONMENT):
        folder = Path(edited)
        if not folder.is_dir():
            raise ConfigError(f"{ENVIRONMENT}={edited} is not a folder", f"make it, or unset {ENVIRONMENT}")
        known = [name + SUFFIX for name in NAMES]
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            if file.name not in known:  # else a misspelt file would quietly leave the packaged contract in force
                raise ConfigError(f"{file} is not the name of a contract", f"call it {nearest(file.name, known)}")
        if (folder / (text + SUFFIX)).is_file():
            return folder / (text + SUFFIX)
    return FOLDER / (text + SUFFIX)


def load_contract(name_or_path: str | Path) -> Contract:
    """Read and validate a contract: `episode` (includes the transition's rules), `transition`, `offline_buffer`.

    Args:
        name_or_path: one of `NAMES`, looked up in LWD_CONTRACTS first, or the path of a file.

    Raises:
        ConfigError: the file is missing, is not YAML, breaks the standard, or has an unknown field, check or
            parameter; it names the file, the line and the nearest valid name.
    """
    path = contract_path(name_or_path)
    contract, includes = _Reader(path).contract()
    for name in includes:
        sibling = path.parent / (name + SUFFIX)
        other, _ = _Reader(sibling if sibling.is_file() else contract_path(name)).contract()
        contract = _merge(contract, other)
    ids: dict[str, Rule] = {}
    for rule in contract.rules:
        if rule.id in ids:
            raise ConfigError(f"{path}: two rules are called {rule.id!r}", "give each rule an id of its own")
        ids[rule.id] = rule
    return contract


def _merge(contract: Contract, other: Contract) -> Contract:
    return Contract(
        name=contract.name,
        version=contract.version,
        path=contract.path,
        purpose=contract.purpose,
        owner=contract.owner,
        fields=contract.fields + other.fields,
        rules=contract.rules + other.rules,
        tasks=contract.tasks,
        action_dim=other.action_dim,
        observation_dim=other.observation_dim,
        notes=contract.notes + other.notes,
        shield=other.shield,
    )


class _Reader:
    """Reads one file. Keeps the YAML's nodes, so that a message can name the line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[Note] = []
        self.place = 0  # of this contract's object among those of the schema
        text = read_text(path, "contract", "restore the contract file")
        self.raw = parse_yaml(path, text, "contract")
        self.root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(self.raw, dict):
            raise ConfigError(f"{path} is not a contract", "begin with `apiVersion:` and `kind: DataContract`")

    def fail(self, at: tuple[str | int, ...], problem: str, fix: str) -> NoReturn:
        """Raise for the entry at that place in the file."""
        node, line = self.root, 1
        for step in at:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == step]
                if not found:
                    break
                line, node = found[0][0].start_mark.line + 1, found[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line + 1
            else:
                break
        raise ConfigError(f"{self.path}:{line}: {problem}", fix)

    def contract(self) -> tuple[Contract, list[str]]:
        """The contract of this file alone, and the names of those it includes."""
        try:
            model = OpenDataContractStandard.model_validate(self.raw)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            at = tuple(step for step in first["loc"] if isinstance(step, str | int))
            self.fail(at, f"field {place!r}: {first['msg']}", "write it as the Open Data Contract Standard v3 says")
        self._unknown_fields(self.raw, model, (), open_=str(model.apiVersion).startswith(_OPEN))
        for key in ("apiVersion", "kind", "id", "name", "version", "schema"):
            if not self.raw.get(key):
                self.fail((), f"field {key!r} is missing", "copy it from the packaged contract")
        if model.kind != "DataContract" or not str(model.apiVersion).startswith("v3."):
            self.fail(("kind",), f"is {model.kind} {model.apiVersion}", "use kind DataContract, apiVersion v3.1.0")
        if model.name not in NAMES:
            self.fail(("name",), f"unknown contract {model.name!r}", f"use {nearest(str(model.name), NAMES)}")
        name = str(model.name)
        names = [one.get("name") for one in self.raw["schema"]]
        self.place = names.index(name) if name in names else 0  # the standard gives the order no meaning
        for index, other in enumerate(names):
            if index != self.place:
                self.notes.append(Note("schema", "object", str(other)))
        custom = self._custom(name)
        fields, rules = self._schema(name)
        if name != "offline_buffer":
            schema_rules = [rule for rule in rules if rule.check == "schema"]
            if not schema_rules or schema_rules[0].severity != "block":
                # every other check reads the fields and may only do so when they are of their types
                self.fail(
                    ("schema", self.place, "quality"), "no blocking rule has check: schema", "put the schema rule back"
                )
        team = self.raw.get("team")
        contract = Contract(
            name=name,
            version=str(model.version),
            path=self.path,
            purpose=str(model.description.purpose or "") if model.description else "",
            owner=str(team["name"]) if isinstance(team, dict) and "name" in team else "",
            fields=fields,
            rules=rules,
            tasks=self._tasks(custom.get("tasks", [])),
            action_dim=int(custom.get("action_dim", 5)),
            observation_dim=custom.get("observation_dim"),
            notes=tuple(self.notes),
            shield=custom.get("shield"),
        )
        if name == "episode" and not contract.tasks:
            self.fail(("customProperties",), "no tasks are agreed on", "list them under the custom property `tasks`")
        return contract, list(custom.get("includes", []))

    def _unknown_fields(self, raw: Any, parsed: Any, at: tuple[str | int, ...], *, open_: bool) -> None:
        """The standard's model drops what it does not know; a typo must not pass as an absent field.

        `open_`: the contract is of a release in which tools may add fields of their own.
        """
        if isinstance(parsed, pydantic.BaseModel) and isinstance(raw, dict):
            valid = {info.alias or name: name for name, info in type(parsed).model_fields.items()}
            for key, value in raw.items():
                if key in valid:
                    self._unknown_fields(value, getattr(parsed, valid[key]), (*at, key), open_=open_)
                    continue
                like = difflib.get_close_matches(str(key).casefold(), [one.casefold() for one in valid], 1, _LIKE)
                if like or not open_ or isinstance(parsed, _CLOSED):
                    self.fail((*at, key), f"unknown field {key!r}", f"use {nearest(str(key), valid)}")
                self.notes.append(Note(".".join(map(str, at)), "field", f"{key}: {value}"))
        elif isinstance(parsed, list) and isinstance(raw, list):
            for index, (one, other) in enumerate(zip(raw, parsed, strict=True)):
                self._unknown_fields(one, other, (*at, index), open_=open_)

    def _custom(self, name: str) -> dict[str, Any]:
        valid = {"episode": ("includes", "tasks"), "transition": ("action_dim", "observation_dim", "shield")}.get(
            name, ()
        )
        found: dict[str, Any] = {}
        for index, entry in enumerate(self.raw.get("customProperties") or []):
            key, value = str(entry.get("property")), entry.get("value")
            at = ("customProperties", index, "property")
            if key in found:
                self.fail(at, f"the custom property {key!r} stands twice", "keep one of the two")
            if key not in valid:
                if difflib.get_close_matches(key.casefold(), valid, 1, _LIKE):
                    self.fail(at, f"unknown custom property {key!r}", f"use {nearest(key, valid)}")
                self.notes.append(Note("customProperties", "custom property", f"{key}: {value}"))
                continue
            if key.endswith("_dim") and (type(value) is not int or value < 1):
                self.fail(at, f"{key} is {value!r}", "give a whole number of at least 1")
            if key == "shield" and not isinstance(value, dict):
                self.fail(at, f"shield is {value!r:.80}", "give a mapping, as in the packaged contract")
            if key == "includes":
                for one in value if isinstance(value, list) else [value]:
                    if one != "transition":
                        self.fail(at, f"cannot include {one!r}", "include [transition]")
            found[key] = value
        return found

    def _tasks(self, entries: Any) -> dict[str, TaskTerms]:
        at = ("customProperties",)
        tasks: dict[str, TaskTerms] = {}
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                self.fail(at, f"task {entry!r} is no mapping", "give key, instruction, substeps, max_steps")
            label = f"task {entry.get('key', '?')}"
            for key in entry.keys() - _TASK_KEYS.keys():
                self.fail(at, f"{label}: unknown field {key!r}", f"use {nearest(str(key), _TASK_KEYS)}")
            for key, kind in _TASK_KEYS.items():
                if type(entry.get(key)) is not kind:
                    self.fail(at, f"{label}: {key} is {entry.get(key)!r}", f"give {key} as {kind.__name__}")
            if entry["key"] in tasks:
                self.fail(at, f"{label} is listed twice", "keep one of the two")
            tasks[entry["key"]] = TaskTerms(**entry)
        return tasks

    def _schema(self, name: str) -> tuple[tuple[Field, ...], tuple[Rule, ...]]:
        raw = self.raw["schema"][self.place]
        fields: list[Field] = []
        rules = self._rules(name, None, raw.get("quality") or [], ("schema", self.place, "quality"))
        for index, entry in enumerate(raw.get("properties") or []):
            at = ("schema", self.place, "properties", index)
            label = str(entry.get("name"))
            attribute = str(entry.get("physicalName") or label)
            if attribute not in FIELDS[name]:
                self.fail((*at, "name"), f"unknown column {attribute!r}", f"use {nearest(attribute, FIELDS[name])}")
            if entry.get("logicalType") not in _LOGICAL_TYPES:
                kind = str(entry.get("logicalType"))
                self.fail((*at, "logicalType"), f"{label}: no type {kind!r}", f"use {nearest(kind, _LOGICAL_TYPES)}")
            if not entry.get("required") and attribute != "policy_version":
                self.fail(at, f"{label} is not required, but every episode has it", "write required: true")
            if attribute in {one.name for one in fields}:
                self.fail((*at, "name"), f"the column {attribute!r} stands twice", "keep one of the two")
            custom = self._of_column(name, label, entry, at)
            fields.append(
                Field(
                    name=attribute,
                    label=label,
                    kind=entry["logicalType"],
                    dtype=str(entry.get("physicalType") or ""),
                    required=bool(entry.get("required")),
                    description=str(entry.get("description") or ""),
                    unit=str(custom.get("unit") or ""),
                    rows=str(custom.get("rows") or ""),
                )
            )
            rules += self._rules(name, attribute, entry.get("quality") or [], (*at, "quality"))
        if missing := FIELDS[name] - {one.name for one in fields}:
            self.fail(
                ("schema", self.place, "properties"), f"lacks {', '.join(sorted(missing))}", "put the columns back"
            )
        return tuple(fields), tuple(rules)

    def _of_column(self, name: str, label: str, entry: dict[str, Any], at: tuple[str | int, ...]) -> dict[str, Any]:
        """A column's custom properties; those of an array say its rows, and its physical type is one of numpy's."""
        custom: dict[str, Any] = {}
        for index, one in enumerate(entry.get("customProperties") or []):
            if (key := one.get("property")) in custom:
                here = (*at, "customProperties", index)
                self.fail(here, f"{label}: the custom property {key!r} stands twice", "keep one of the two")
            custom[key] = one.get("value")
        if name == "transition":
            if custom.get("rows") not in _ROWS:
                self.fail(
                    at,
                    f"{label}: rows is {custom.get('rows')!r}",
                    f"give the custom property rows, {' or '.join(_ROWS)}",
                )
            try:
                np.dtype(str(entry.get("physicalType") or "?!"))
            except TypeError:
                kind = entry.get("physicalType")
                self.fail(
                    (*at, "physicalType"), f"{label}: no type {kind!r} of numbers", "give float32, float64 or bool"
                )
        return custom

    def _is_rule(self, quality: DataQuality, at: tuple[str | int, ...]) -> bool:
        """Whether an entry is a rule of ours; one that is meant to be, and says so wrongly, is refused."""
        kind, engine = quality.type or "library", quality.engine or ""
        if kind not in _QUALITY_TYPES:
            self.fail((*at, "type"), f"no type {kind!r} of quality", f"use {nearest(kind, _QUALITY_TYPES)}")
        if kind == "custom" and engine == _ENGINE:
            return True
        ours = isinstance(quality.implementation, dict) and "check" in quality.implementation
        if ours or difflib.get_close_matches(engine.casefold(), [_ENGINE], 1, _LIKE) or engine.casefold() == _ENGINE:
            fix = f"use type: custom, engine: {_ENGINE}, implementation: {{check: …}}"
            self.fail(at, f"rule {quality.id or '?'!r} cannot be run: type {kind}, engine {engine!r}", fix)
        return False

    def _rules(self, name: str, field: str | None, entries: list[Any], at: tuple[str | int, ...]) -> list[Rule]:
        rules = []
        for index, entry in enumerate(entries):
            here = (*at, index)
            quality = DataQuality.model_validate(entry)
            rule_id = quality.id or "?"
            implementation = quality.implementation
            if not self._is_rule(quality, here):
                kind = quality.type or "library"
                text = quality.description or quality.query or quality.metric or str(implementation or "")
                self.notes.append(Note(field or "the object", f"quality entry, type {kind}", text))
                continue
            if not isinstance(implementation, dict):
                self.fail(here, f"rule {rule_id!r} cannot be run", "give implementation: {check: …} and its parameters")
            if not quality.id or not re.fullmatch(r"[a-z0-9-]+", quality.id):
                self.fail(here, f"rule id {quality.id!r}", "give it an id of lower-case letters, digits and dashes")
            if quality.severity not in SEVERITIES:
                severity = str(quality.severity)
                fix = f"use {nearest(severity, SEVERITIES)}"
                self.fail((*here, "severity"), f"rule {rule_id!r}: no severity {severity!r}", fix)
            owners = [one.value for one in quality.customProperties or [] if one.property == "owner"]
            if len(owners) != 1 or not owners[0]:
                self.fail(here, f"rule {rule_id!r} has no owner", "add customProperties: [{property: owner, value: …}]")
            parameters = dict(implementation)
            check = str(parameters.pop("check", None))
            if wrong := problem(name, field, check, parameters):
                self.fail((*here, "implementation", *wrong.at), f"rule {rule_id!r}: {wrong.problem}", wrong.fix)
            rules.append(
                Rule(
                    id=quality.id,
                    check=check,
                    severity=cast(Severity, quality.severity),
                    owner=str(owners[0]),
                    description=str(quality.description or ""),
                    field=field,
                    parameters=parameters,
                    contract=name,
                )
            )
        return rules
