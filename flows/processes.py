"""The processes of an online stage: what each is started with, in either profile.

Local: coordinator, learner and robots share the catalog. Fleet: a relay carries the outbox to Kafka, robots know the
ingest service alone, and a reconciler looks after what servers lose.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.deployment import Deployment, read_json
from flows.params import Params
from infra.fleet.robot import RobotConfig, robot_command, robot_environment
from infra.service.auth import Tokens
from infra.supervisor import ProcessSpec

STATUS = "status.json"  # of the learner, in its folder
CHECK = "data_contracts.checks:default_check"
SHIELD = "data_contracts.shield:default_shield"
RECONCILE_S = 60.0  # pause between two passes, seconds
_TOKEN_DAYS = 30.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
_PREFIX = {"learning": "r", "production": "p", "canary": "c"}  # of a simulated robot's name, by its cohort


def server_specs(home: Path, profile: str) -> list[ProcessSpec]:
    """What takes episodes in, and what renews permissions; in a fleet also service, relay and reconciler."""
    specs = [
        _spec("coordinator", "infra.coordinator", home, "--check", CHECK, "--standby"),
        _spec("renewer", "infra.policy.renew", home),
    ]
    if profile == "fleet":
        specs += [
            _spec("service", "infra.service", home),
            _spec("relay", "infra.events.relay", home),
            _spec("reconciler", "infra.reconcile", home, "--every", str(RECONCILE_S)),
            _spec("canary", "flows.canary", home),
        ]
    return specs


def learner_spec(home: Path, params: Params, params_path: Path) -> ProcessSpec:
    """The learner, with as many threads as `workers`; its progress are its updates."""
    spec = _spec("learner", "flows.online_learner", home, "--params", str(params_path))
    status = home / "learner" / STATUS
    return replace(spec, env={"OMP_NUM_THREADS": str(params.workers)}, progress=lambda: updates_done(read_json(status)))


def updates_done(status: dict[str, Any]) -> int:
    """The updates that a learner's status tells of; 0 where it tells of none."""
    done = status.get("updates")
    return done if isinstance(done, int) else 0


def robot_specs(plane: Deployment, params: Params) -> list[ProcessSpec]:
    """The simulated robots; each of a cohort begins with another task, so that a short run covers all of them.

    Operators attend the learning cohort alone: the others show what a policy does by itself.
    """
    p, settings = params.online, plane.settings
    cohorts = {"learning": (p.robots, p.operator), "production": (p.production, 0.0), "canary": (p.canary, 0.0)}
    specs = []
    for cohort, (robots, operator) in cohorts.items():
        for number in range(robots):
            first = number % len(params.tasks)
            config = RobotConfig(
                f"{_PREFIX[cohort]}{number}", params.tasks[first:] + params.tasks[:first], seed=params.seed,
                operator=operator, cohort=cohort, pace=p.pace, drain_s=30.0, shield=SHIELD,
            )  # fmt: skip
            home, env = settings.home, robot_environment()
            if settings.profile == "fleet":
                home, env = _robots_home(plane), env | _credentials(plane, config)
            command = [*robot_command(home, config), "--parent", str(os.getpid())]
            specs.append(ProcessSpec(f"robot-{config.robot_id}", command, env))
    return specs


def _robots_home(plane: Deployment) -> Path:
    """A robot's own folder, here shared by the simulated ones: no database or store keys, only the public ones."""
    home, keys = plane.settings.home / "fleet", plane.settings.keys_dir
    shutil.copytree(keys / "trusted", home / "keys" / "trusted", dirs_exist_ok=True)
    return home


def _credentials(plane: Deployment, config: RobotConfig) -> dict[str, str]:
    settings = plane.settings
    tokens = Tokens(plane.catalog)
    tokens.revoke(config.robot_id)  # the token of an earlier run was in that run's environment only
    token = tokens.enrol(config.robot_id, config.cohort, days=_TOKEN_DAYS, actor="online flow")
    scheme = "https" if settings.ingest_cert else "http"
    url = settings.ingest_url or f"{scheme}://{settings.ingest_host}:{settings.ingest_port}"
    env = {"LWD_INGEST_URL": url, "LWD_ROBOT_TOKEN": token, "LWD_PROFILE": "fleet"}
    return env | ({"LWD_INGEST_CA": str(settings.ingest_ca)} if settings.ingest_ca else {})


def _spec(name: str, module: str, home: Path, *arguments: str) -> ProcessSpec:
    command = [sys.executable, "-m", module, "--home", str(home), *arguments, "--parent", str(os.getpid())]
    return ProcessSpec(name, command, _ONE_THREAD)
