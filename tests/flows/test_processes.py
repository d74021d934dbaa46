"""The processes of an online stage, as they are named and started."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.deployment import deployment
from flows.params import Params, load_params
from flows.processes import robot_specs

ROOT = Path(__file__).parents[2]


def params(**online: object) -> Params:
    given = load_params(ROOT / "params.yaml")
    return given.model_copy(update={"online": given.online.model_copy(update=online)})


def started(home: Path, given: Params) -> dict[str, dict[str, str]]:
    """The options of each robot's process, by the process's name."""
    with deployment(home) as plane:
        specs = robot_specs(plane, given)
    words = {spec.name: spec.argv[3:] for spec in specs}
    return {name: dict(zip(line[::2], line[1::2], strict=True)) for name, line in words.items()}


def test_each_cohort_has_its_robots_and_operators_attend_the_learning_one(tmp_path: Path) -> None:
    robots = started(tmp_path, params(robots=2, production=2, canary=1, operator=0.5))
    assert {name: (given["--cohort"], given["--operator"]) for name, given in robots.items()} == {
        "robot-r0": ("learning", "0.5"), "robot-r1": ("learning", "0.5"), "robot-p0": ("production", "0.0"),
        "robot-p1": ("production", "0.0"), "robot-c0": ("canary", "0.0"),
    }  # fmt: skip


@pytest.mark.parametrize("robots", [1, 4, 6])
def test_the_robots_of_a_cohort_begin_with_different_tasks(tmp_path: Path, robots: int) -> None:
    given = params(robots=robots)
    tasks = [options["--tasks"].split(",") for options in started(tmp_path, given).values()]
    assert len(tasks) == robots and all(set(own) == set(given.tasks) for own in tasks)
    assert len({own[0] for own in tasks}) == min(robots, len(given.tasks))
