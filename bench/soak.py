"""Many episodes through real servers while faults are injected: `python -m bench.soak --episodes 30000 --actors 16`.

Robots spool, send and confirm; processes, servers, links and data are hurt at random moments of a seeded schedule; when
the robots are done and everything is settled, the history checker reconciles. Exit code 1 if an invariant broke, or if
it did not come to rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import actors, hostile
from bench.envelope import RESULTS, Envelope
from bench.faults import Injector
from bench.fleet import Fleet, sigterm_interrupts
from bench.history import Verdict, check
from bench.oplog import operations
from bench.soak_figure import figure
from infra.catalog.schema import episodes, quarantine, snapshots
from infra.errors import LwdError

KEPT_ACTORS = 16  # of the run in docs/results/soak.json
LOOK_S = 3.0
_DRAIN_S = 600.0  # for robots to empty their spools once they record no more
_SETTLE_S = 300.0


class Watch:
    """Counts what was committed and settled, while the processes are kept alive."""

    def __init__(self, fleet: Fleet, injector: Injector, bar: Progress, total: int) -> None:
        self._fleet, self._injector, self._bar = fleet, injector, bar
        self._task = bar.add_task("soak", total=total, committed=0, faults=0, restarts=0)
        self._began, self._due = time.monotonic(), 0.0
        self.progress: list[dict[str, float]] = []
        self.cpu: dict[str, float] = {}

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def look(self) -> None:
        """Restart what died; every `LOOK_S`, count."""
        self._fleet.supervisor.poll()
        time.sleep(0.1)
        if self.now() < self._due:
            return
        self._due = self.now() + LOOK_S
        self.cpu = self._fleet.cpu_seconds()
        if found := _counts(self._fleet):
            self.progress.append({"at": round(self.now(), 1), **found})
            restarts = sum(self._fleet.supervisor.restarts.values())
            committed, faults = found["committed"], len(self._injector.done)
            self._bar.update(
                self._task, completed=found["settled"], committed=committed, faults=faults, restarts=restarts
            )
            if not self._bar.console.is_terminal:
                line = (
                    f"{found['settled']:6d} settled of {committed:6d} committed, {faults} faults, {restarts} restarts"
                )
                self._bar.console.print(f"{self.now():6.0f} s  {line}", highlight=False)

    def at_rest(self) -> bool:
        """Whether all that was committed is in a snapshot or in quarantine, and the reader has it."""
        last = self.progress[-1] if self.progress else {"committed": -1, "settled": 0, "version": 0}
        fresh = len(self.progress) > 1 and last == self.progress[-2] | {"at": last["at"]}
        return fresh and last["committed"] == last["settled"] and _read(self._fleet, int(last["version"]))


def soak(folder: Path, options: argparse.Namespace) -> tuple[Verdict, dict[str, Any]]:
    """The run; the verdict and what else is worth telling."""
    fleet = Fleet(folder, micro_batch=64, lease_s=3.0, s3_timeout_s=5.0, fetch_retries=8, cache_max_mib=32)
    columns = (
        TextColumn("{task.completed} settled of {task.total}"),
        BarColumn(),
        TextColumn(
            "{task.fields[committed]} committed, {task.fields[faults]} faults, {task.fields[restarts]} restarts"
        ),
        TimeElapsedColumn(),
    )
    injector = Injector(fleet, options.seed, options.every, only=options.only)
    try:
        fleet.start_processes(reconcile_s=5.0, grace_s=20.0, sweep_s=60.0)
        fleet.enrol(options.actors, [hostile.hostile_name(number) for number in range(options.hostile)])
        each = ["--episodes", str(-(-options.episodes // options.actors)), "--seed", str(options.seed)]
        each += ["--breach", str(options.breach), "--pace", str(options.pace), "--poll", "0.5"]
        with Progress(*columns) as bar:
            watch = Watch(fleet, injector, bar, options.episodes)
            hosts = fleet.start_robots("actors", "bench.actors", options.actors, options.hosts, each)
            if options.every:
                injector.start()
            late, hostile_at = _drive(fleet, injector, watch, hosts, options)
        wall = watch.now()
        restarts = fleet.supervisor.restarts
        fleet.supervisor.stop()
        damaged_late = injector.mend()
        log = operations(fleet.robots / actors.KIND)
        verdict = check(fleet.catalog, fleet.objects, log, fleet.home / "reader.jsonl")
        fared = hostile.honest(fleet.catalog, hostile_at)
    finally:
        fleet.close()
    verdict.broken += late
    return verdict, {
        "faults_injected": dict(sorted(Counter(str(fault["kind"]) for fault in injector.done).items())),
        "faults_skipped": dict(sorted(injector.skipped.items())),
        "damaged_too_late": damaged_late,
        "restarts": sum(restarts.values()),
        "restarts_by_process": restarts,
        "episodes_per_s": round(verdict.spooled / wall, 2),
        "run_s": round(wall, 1),
        "cpu_s": watch.cpu,
        "hostile": options.hostile,
        "honest": fared,
        "faults": injector.done,
        "progress": watch.progress,
    }


def _drive(
    fleet: Fleet, injector: Injector, watch: Watch, hosts: list[str], options: argparse.Namespace
) -> tuple[list[str], float]:
    """Until the robots are done and all is settled; what did not come to rest, and when hostile robots began."""
    late, hostile_at = [], float("inf")
    end = options.minutes_max * 60
    while not all(fleet.supervisor.finished(name) for name in hosts):
        watch.look()
        committed = watch.progress[-1]["committed"] if watch.progress else 0
        if options.hostile and hostile_at == float("inf") and 2 * committed >= options.episodes:
            hostile_at = time.time()  # half of the run is without them, to compare with
            words = ["--seed", str(options.seed), "--only", *options.misdeeds]
            fleet.start_robots(hostile.KIND, "bench.hostile", options.hostile, 1, words)
        if watch.now() > options.minutes_max * 60:
            (fleet.robots / "enough").touch()
        if watch.now() > end + _DRAIN_S:
            late.append("I1: robots could not empty their spools in time")
            break
    injector.stop()
    end = watch.now() + _SETTLE_S
    while not watch.at_rest():
        if hostile_at != float("inf"):
            (fleet.robots / hostile.ENOUGH).touch()
        watch.look()
        if watch.now() > end:
            late.append(f"I1: not all is settled and read after {_SETTLE_S:.0f} s: {watch.progress[-1]}")
            break
    return late, hostile_at


def _counts(fleet: Fleet) -> dict[str, int]:
    """Committed and settled episodes, and the version; nothing while the database is away."""
    count = sa.select(sa.func.count())
    mine = sa.and_(quarantine.c.episode_id == episodes.c.episode_id, quarantine.c.sha256 == episodes.c.sha256)
    newest = sa.select(snapshots.c.version, snapshots.c.episodes).order_by(snapshots.c.version.desc()).limit(1)
    try:
        with fleet.catalog.read() as connection:
            committed = connection.execute(count.select_from(episodes)).scalar_one()
            held = connection.execute(count.select_from(quarantine).join(episodes, mine)).scalar_one()
            last = connection.execute(newest).first()
    except LwdError:
        return {}
    version, members = (last.version, last.episodes) if last else (0, 0)
    return {"committed": committed, "settled": members + held, "version": version}


def _read(fleet: Fleet, version: int) -> bool:
    path = fleet.home / "reader.jsonl"
    return version == 0 or (path.exists() and f'"version": {version},' in path.read_text()[-400:])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=30_000)
    parser.add_argument("--actors", type=int, default=KEPT_ACTORS)
    parser.add_argument("--hosts", type=int, default=4, help="processes that the actors share")
    parser.add_argument("--pace", type=float, default=0.0, help="mean seconds between two of a robot; 0: at once")
    parser.add_argument("--every", type=float, default=5.0, help="mean seconds between two faults; 0 for none")
    parser.add_argument("--only", nargs="*", default=[], help="kinds of faults; all if not given")
    parser.add_argument("--breach", type=float, default=0.01, help="share of episodes that break the contract")
    parser.add_argument("--hostile", type=int, default=0, help="hostile robots, from half of the run on")
    parser.add_argument("--misdeeds", nargs="*", default=[], help="theirs; all if not given")
    parser.add_argument("--minutes-max", type=float, default=100.0, help="then nothing more is recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/soak"))
    parser.add_argument("--out", type=Path, help="JSON file; docs/results/soak.json, or soak-N.json of N other actors")
    options = parser.parse_args(words)
    if options.out is None:
        options.out = RESULTS / ("soak.json" if options.actors == KEPT_ACTORS else f"soak-{options.actors}.json")
    return options


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    sigterm_interrupts()
    command = " ".join(["python -m bench.soak", *(sys.argv[1:] if words is None else words)])
    envelope = Envelope("soak", command, [options.seed])
    verdict, found = soak(options.folder, options)
    results = {"episodes": verdict.spooled, "actors": options.actors, "seed": options.seed, **vars(verdict), **found}
    results["broken"] = verdict.broken[:50]
    envelope.write(options.out, results)
    figure(options.out.with_suffix(".svg"), results)
    shown = ("episodes", "in_snapshot", "quarantined_by_stage", "duplicates_in_snapshot", "unaccounted", "restarts",
             "faults_injected", "faults_skipped", "episodes_per_s", "run_s", "cpu_s", "honest")  # fmt: skip
    for name in shown:
        print(f"{name}: {results[name]}")
    for line in verdict.broken[:20]:
        print(line, file=sys.stderr)
    return 1 if verdict.broken else 0


if __name__ == "__main__":
    sys.exit(main())
