"""Prefect flow `online`: supervises coordinator, robots and learner until the stage's updates are done.

Each of them is a process that may die at any moment and is started again; so may the flow itself: run again, it goes on
from the catalog, the spools and the learner's checkpoint. A lease keeps two runs on one deployment apart. One flow run
is one stage, never one episode.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from flows.console import green, progress, red, say, yellow
from flows.deployment import Deployment, deployment, read_json
from flows.params import Params, load_params
from flows.processes import STATUS, learner_spec, robot_specs, server_specs, updates_done
from flows.promotion import introduce
from infra import interrupts
from infra.catalog import schema
from infra.catalog.leases import Lease
from infra.errors import CorruptDataError, LeaseLostError, UnavailableError
from infra.supervisor import PARTS, Supervisor, read_parts
from infra.telemetry import metrics

_STOP_S, _HURRY_S = 15.0, 5.0  # for the processes to end, after it and when it is interrupted
ESSENTIAL = {"learner", "coordinator"}  # without them the stage comes to no end


@dataclass(frozen=True)
class OnlineSummary:
    """What the stage did; every number is read back from the catalog.

    Attributes:
        episodes: in the latest snapshot. interventions: those with a takeover. quarantined: refused.
        unaccounted: committed episodes that are neither in a snapshot nor in quarantine; 0, or the run is wrong.
        policies: published. redeployments: activations by robots after their first policy.
        restarts: by process, how often it was started again.
        isolated: processes that kept dying to the end.
    """

    episodes: int
    interventions: int
    quarantined: int
    unaccounted: int
    policies: int
    redeployments: int
    updates: int
    restarts: dict[str, int]
    isolated: list[str]


@task
def deploy_first(home: str) -> int:
    """Publish the pipeline's policies to a new deployment; version of the one that the learning cohort begins with."""
    with deployment(Path(home)) as plane:
        return introduce(plane)[1]


@task
def supervise(home: str, params_path: str) -> dict[str, int]:
    """Run fleet and learner to the end of the stage; then bring the robots home and the spools to the snapshot."""
    from data_contracts.contract import load_contract

    params, folder = load_params(Path(params_path)), Path(home)
    load_contract("episode")  # a typo stops here, before it would send every episode to quarantine
    with deployment(folder) as plane:
        settings = plane.settings
        supervisor = Supervisor(settings.logs_dir, state=folder / PARTS)
        metrics.serve(settings, "supervisor")
        lease = Lease(plane.catalog, "supervisor", settings.lease_s)
        _take(lease)
        robots = robot_specs(plane, params)
        specs = (*server_specs(folder, settings.profile), learner_spec(folder, params, Path(params_path)), *robots)
        watch = Watch(supervisor, settings.patience_s)
        try:
            for spec in specs:
                supervisor.start(spec)
            _watch(watch, lease, folder / "learner" / STATUS, params)
            supervisor.stop([spec.name for spec in robots], timeout_s=60.0)
            _drain(watch, plane)
        except BaseException:  # robots first: while the others run, what they hold comes home; the rest stays in spools
            supervisor.stop([spec.name for spec in robots if spec.name in supervisor.restarts], timeout_s=_HURRY_S)
            raise
        finally:
            supervisor.stop(timeout_s=_STOP_S)
            lease.release()
        return supervisor.restarts


def _take(lease: Lease) -> None:
    """Become the one supervisor of this deployment. One that was killed is waited out.

    Raises:
        LeaseLostError: another one lives; it is named.
    """
    end = time.monotonic() + 2 * lease.seconds
    while True:
        try:
            lease.acquire()
            return
        except LeaseLostError:
            if time.monotonic() > end:
                raise
            time.sleep(lease.seconds / 10)


class Watch:
    """Looks after the stage's processes, and says on screen, metrics and `lwd status` how they fare.

    Args:
        patience_s: how long the stage goes on collecting while a part that it cannot do without keeps dying.
    """

    def __init__(self, supervisor: Supervisor, patience_s: float) -> None:
        self.supervisor = supervisor
        self._patience_s = patience_s
        self._told: dict[str, tuple[str, str]] = {}  # part -> the cause that was shown
        self._isolated: set[str] = set()

    def poll(self) -> None:
        """Restart what is due.

        Raises:
            UnavailableError: the learner or the coordinator has been isolated for `patience_s`. Nothing is lost: what
                robots have committed and what the learner has saved is there when the command is started again.
        """
        for name in self.supervisor.poll():
            cause = self.supervisor.cause(name)
            metrics.PART_RESTARTS.inc(part=name)
            lines = re.sub(r"\d+", "", cause).splitlines()  # times and process numbers are no other cause
            if lines and self._told.get(name) != (lines[0], lines[-1]):  # once for each, however often it comes
                self._told[name] = (lines[0], lines[-1])
                say(yellow(f"  {name} died and is started again"), f"; it {cause}")
        isolated = self.supervisor.isolated
        for name in self._isolated - isolated.keys():
            say(green(f"  {name} works again"))
            metrics.PART_ISOLATED.set(0, part=name)
        for name in isolated.keys() - self._isolated:
            say(
                red(f"  {name} keeps dying and is isolated"),
                f": started again after minutes; the rest of the stage goes on. {self.supervisor.log(name)}",
            )
            metrics.PART_ISOLATED.set(1, part=name)
        self._isolated = set(isolated)
        for name in ESSENTIAL & isolated.keys():
            part = isolated[name]
            if time.time() - part.since > self._patience_s:
                raise UnavailableError(
                    f"process {name!r} died {part.deaths} times in a row; it {part.cause}",
                    f"correct the cause, then run the same command again: it goes on from here. Whole log: "
                    f"{self.supervisor.log(name)}; LWD_PATIENCE_S is how long to wait",
                )


def _watch(watch: Watch, lease: Lease, status_file: Path, params: Params) -> None:
    with progress("online RL", params.online.updates) as advance:
        done, renew_at = 0, 0.0
        while not watch.supervisor.finished("learner"):
            interrupts.check()
            if time.monotonic() > renew_at:
                _renew(lease)
                renew_at = time.monotonic() + lease.seconds / 3
            watch.poll()
            status = _status(status_file)
            if status:
                note = f"{status.get('episodes')} episodes  policy v{status.get('version') or '-'}"
                if lost := ", ".join(watch.supervisor.isolated):
                    note += f"  ISOLATED: {lost}"
                advance(max(0, updates_done(status) - done), note)
                done = max(done, updates_done(status))
            time.sleep(0.5)
        advance(max(0, params.online.updates - done), "")


def _status(path: Path) -> dict[str, Any]:
    """What the learner told last; empty where that cannot be read, which must not end the watching."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return read_json(path)
    return {}


def _renew(lease: Lease) -> None:
    """Renew the lease; a database that is away is waited for, since nobody can take the lease meanwhile either."""
    try:
        lease.acquire()
    except UnavailableError as error:
        say(yellow(f"  {error.problem}"))


def _drain(watch: Watch, plane: Deployment, timeout_s: float = 120.0) -> None:
    """Wait until the coordinator has settled every committed episode."""
    end = time.monotonic() + timeout_s
    while plane.unaccounted() and time.monotonic() < end:
        watch.poll()
        time.sleep(0.2)


@task
def audit_snapshot(home: str) -> bool:
    """The whole snapshot against the episode contract, in Great Expectations; what single episodes cannot show."""
    from data_contracts.contract import load_contract
    from data_contracts.suites import validate_batch

    with deployment(Path(home)) as plane:
        report = validate_batch(load_contract("episode"), plane.members())
    for violation in report.violations:
        say(yellow(f"  snapshot: {violation.severity}: {violation.rule}: {violation.message}"))
    return report.success


def summarise(plane: Deployment, restarts: dict[str, int]) -> OnlineSummary:
    """Read the stage's figures back from the catalog."""
    members = schema.snapshot_episodes
    parts = read_parts(plane.settings.home / PARTS).get("parts", [])
    with plane.catalog.read() as connection:

        def count(table: sa.Table, *conditions: sa.ColumnElement[bool]) -> int:
            return int(
                connection.execute(sa.select(sa.func.count()).select_from(table).where(*conditions)).scalar_one()
            )

        return OnlineSummary(
            episodes=count(members, members.c.removed.is_(None)),
            interventions=count(members, members.c.removed.is_(None), members.c.interventions > 0),
            quarantined=count(schema.quarantine),
            unaccounted=plane.unaccounted(),
            policies=count(schema.policies),
            redeployments=count(schema.measurements, schema.measurements.c.name == "publish_to_active_s"),
            updates=updates_done(read_json(plane.settings.home / "learner" / STATUS)),
            restarts=restarts,
            isolated=[part["name"] for part in parts if part.get("state") == "isolated"],
        )


@flow(name="online", flow_run_name="online")
def online(home: str = "runs/local", params_path: str = "params.yaml") -> dict[str, Any]:
    """Deploy the offline policy to the fleet and keep improving it from what the fleet does.

    Args:
        home: the deployment.
        params_path: parameters; the stage's are under `online`.
    """
    first = deploy_first(home)
    say(f"policy v{first} is deployed to the learning cohort")
    restarts = supervise(home, params_path)
    with deployment(Path(home)) as plane:
        summary = summarise(plane, restarts)
        version = plane.snapshots.verify()
    if summary.unaccounted:
        raise CorruptDataError(
            f"{summary.unaccounted} committed episodes are in no snapshot and not in quarantine",
            "run the flow again: the coordinator takes them up where it stopped",
        )
    sound = audit_snapshot(home) if summary.episodes else True
    rows = asdict(summary) | {"snapshot passes its contract": sound}
    create_markdown_artifact("\n".join(f"- {name}: {value}" for name, value in rows.items()), key="online-summary")
    say(f"snapshot {version} holds {summary.episodes} episodes, {summary.quarantined} in quarantine, 0 unaccounted")
    return asdict(summary)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m flows.online HOME [PARAMS]`, without Prefect's engine: for benchmarks and for tests."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m flows.online")
    parser.add_argument("--home", default="runs/local")
    parser.add_argument("--params", default="params.yaml")
    options = parser.parse_args(arguments)
    deploy_first.fn(options.home)
    restarts = supervise.fn(options.home, options.params)
    with deployment(Path(options.home)) as plane:
        print(json.dumps(asdict(summarise(plane, restarts)), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
