"""Dashboards and alerts name only metrics and labels that exist; both are whole; the documentation explains all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql import named

from infra.telemetry import metrics

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "infra" / "grafana"
DOCUMENT = (ROOT / "docs" / "observability.md").read_text()
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
# What Prometheus and its client library add to ours.
TARGET_LABELS = {"job", "instance", "process", "host"}
OF_OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything."""
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            yield from ((f"{name}: {panel['title']}", target["expr"]) for target in panel["targets"])
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)


def labels_of(name: str) -> set[str] | None:
    """The labels of a series by its name in PromQL; None where there is no such series."""
    if name in OF_OTHERS:
        return set(TARGET_LABELS)
    instrument = metrics.DEFINED.get(name)
    if instrument is not None and instrument.kind != "histogram":
        return set(instrument.labels) | TARGET_LABELS
    base, _, suffix = name.rpartition("_")
    instrument = metrics.DEFINED.get(base)
    if instrument is not None and instrument.kind == "histogram" and suffix in ("bucket", "sum", "count"):
        return {*instrument.labels, *TARGET_LABELS, *(["le"] if suffix == "bucket" else [])}
    return None


def problems(expression: str) -> list[str]:
    """What is wrong with the names in an expression."""
    found = named(expression)
    wrong, known = [], set()
    for name, matched in found.metrics.items():
        labels = labels_of(name)
        if labels is None:
            wrong.append(f"no metric {name}")
        else:
            known |= labels
            wrong += [f"{name} has no label {label}" for label in matched - labels]
    return wrong + [f"no label {label}" for label in found.grouping - known]


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=[where for where, _ in expressions()])
def test_every_metric_and_label_that_is_named_exists(where: str, expression: str) -> None:
    assert named(expression).metrics, "names no metric at all"
    assert problems(expression) == []


@pytest.mark.parametrize(
    ("expression", "metric_names", "grouping"),
    [
        ("up == 0", {"up": set()}, set()),
        ('sum by (a, b) (rate(x_total{c="d",e=~"f|g"}[5m])) > 1e3', {"x_total": {"c", "e"}}, {"a", "b"}),
        ("sum(rate(x[5m])) by (le)", {"x": set()}, {"le"}),
        ("time() - max(x) > 30 and on (r) max by (r) (y) > 0", {"x": set(), "y": set()}, {"r"}),
        ("x unless y offset 5m", {"x": set(), "y": set()}, set()),
        ('x{a="b{c}"} / y', {"x": {"a"}, "y": set()}, set()),
    ],
)
def test_the_names_are_found(expression: str, metric_names: dict[str, set[str]], grouping: set[str]) -> None:
    assert (named(expression).metrics, named(expression).grouping) == (metric_names, grouping)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(lwd_no_such_total[5m])", "no metric lwd_no_such_total"),
        (
            "lwd_episode_to_learner_seconds",
            "no metric lwd_episode_to_learner_seconds",
        ),  # only its _bucket, _sum, _count
        ("lwd_consumer_lag_events_total", "no metric lwd_consumer_lag_events_total"),
        ('lwd_quarantine_episodes{robot="r0"}', "lwd_quarantine_episodes has no label robot"),
        ("sum by (robot) (lwd_snapshot_version)", "no label robot"),
        ("sum by (le) (lwd_snapshot_version)", "no label le"),
    ],
)
def test_the_check_finds_what_it_looks_for(expression: str, problem: str) -> None:
    assert problems(expression) == [problem]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_can_be_imported_anywhere(name: str) -> None:
    dashboard = DASHBOARDS[name]
    assert dashboard["schemaVersion"] >= 36 and dashboard["uid"] and dashboard["title"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels(dashboard):
        assert panel["title"]
        for where in (panel, *panel["targets"]):
            assert where["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        used = {word for target in panel["targets"] for word in re.findall(r"\$(\w+)", target["expr"])}
        assert used <= variables.keys() | {"__rate_interval"}, panel["title"]
    for variable in variables.values():
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in (labels_of(metric) or ())


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_lie_on_the_grid_and_not_on_each_other(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARDS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["h"] > 0
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]


def test_alerts_say_what_is_wrong_and_how_urgent_it_is() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]


def test_an_alert_s_summary_uses_labels_that_its_expression_keeps() -> None:
    for rule in RULES:
        kept = named(rule["expr"]).grouping or TARGET_LABELS
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert used <= kept, rule["alert"]


def test_prometheus_finds_the_rules_and_the_processes() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [FOLDER / name for name in config["rule_files"]] == [FOLDER / "alerts.yaml"]
    (scrape,) = config["scrape_configs"]
    (pattern,) = scrape["file_sd_configs"][0]["files"]
    assert (FOLDER / pattern).resolve() == (ROOT / "runs/local/metrics" / "*.json").resolve()
    jobs = set(re.findall(r'job="(\w+)"', "\n".join(expression for _, expression in expressions())))
    assert jobs == {scrape["job_name"]}


def test_every_metric_is_documented_as_it_is() -> None:
    missing = [row for row in metrics.table().splitlines() if row not in DOCUMENT]
    assert missing == [], "paste the output of `python -m infra.telemetry.metrics` into docs/observability.md"
    documented = set(re.findall(r"^\| `(lwd_\w+)` \|", DOCUMENT, re.MULTILINE))
    assert documented == metrics.DEFINED.keys()


def test_every_alert_is_documented() -> None:
    assert re.findall(r"^### (Lwd\w+)", DOCUMENT, re.MULTILINE) == [rule["alert"] for rule in RULES]
