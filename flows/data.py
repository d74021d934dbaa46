"""`lwd data`: what a steward or an operator does with the data of a deployment, beside its running processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import sqlalchemy as sa
import typer
from rich.table import Table

from flows.console import out
from flows.once import App
from infra.catalog import Catalog, dialect, leases
from infra.catalog.schema import dead_letters as letters
from infra.catalog.schema import quarantine, robots
from infra.errors import ConfigError
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.settings import default_home, load_settings

app = App(no_args_is_help=True, help="The data of a deployment: mend, free, revoke, release, verify, recover.")
Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
Actor = Annotated[str, typer.Option(help="Who decides; goes into the audit.")]
HOME = default_home()
DAY_S = 86_400.0
_REASON = 300  # characters of a reason that are shown
MIN_GRACE_S = 60.0  # a running process takes less between two of its steps


@contextmanager
def _opened(home: Path) -> Iterator[tuple[Catalog, ObjectStore]]:
    settings = load_settings(home=home)
    catalog = open_catalog(settings, migrate=True)
    try:
        yield catalog, open_objects(settings)
    finally:
        catalog.close()


@app.command()
def reconcile(
    home: Home = HOME,
    grace_s: Annotated[float, typer.Option("--grace", min=0, help="Age of a difference that is mended, s.")] = 3600.0,
) -> None:
    """Announce again what a broker lost, ask again for lost objects, delete uploads that were never committed."""
    from infra.reconcile import reconcile as mend

    with _opened(home) as (catalog, objects):
        if grace_s < MIN_GRACE_S:
            _nobody_works(catalog, grace_s)
        found = mend(catalog, objects, grace_s=grace_s)
    table = Table("announced again", "objects lost", "orphans", "uploads deleted", "unfinished writes deleted")
    table.add_row(
        str(found.announced_again), str(found.objects_lost), str(found.orphans), str(found.incoming_deleted),
        str(found.unfinished_deleted),
    )  # fmt: skip
    out.print(table)
    if found.orphans:
        out.print(f"{found.orphans} stored objects have no row in the catalog: bring them back with `lwd data recover`")


def _nobody_works(catalog: Catalog, grace_s: float) -> None:
    """Raises:
    ConfigError: processes are at work, which may take longer than the grace between two of their steps.
    """
    with catalog.read() as connection:
        at_work = [f"{name} ({holder})" for name, holder in leases.held(connection)]
        seen = robots.c.last_seen > dialect.now(connection) - MIN_GRACE_S
        at_work += [f"robot {name}" for name in connection.execute(sa.select(robots.c.robot_id).where(seen)).scalars()]
    if at_work:
        raise ConfigError(
            f"a grace of {grace_s:g} s is too short while {at_work[0]} is at work: what is under way looks forgotten",
            f"give --grace {MIN_GRACE_S:g} or more, or stop the deployment first",
        )


@app.command()
def collect(
    home: Home = HOME,
    keep_days: Annotated[float, typer.Option(min=0, help="Snapshots that were current since then stay.")] = 30.0,
    actor: Actor = "operator",
) -> None:
    """Free the objects of episodes that were withdrawn or revoked, where no kept or pinned snapshot has them."""
    from infra.collect import collect as free

    with _opened(home) as (catalog, objects):
        done = free(catalog, objects, keep_s=keep_days * DAY_S, actor=actor)
    out.print(f"{done.objects} objects freed, {done.bytes / 2**20:.1f} MiB; the oldest snapshot kept is {done.floor}")


@app.command()
def revoke(
    robot: Annotated[str, typer.Argument(help="Its id.")],
    reason: Annotated[str, typer.Option(help="Why; goes into the audit and to the reviewers.")],
    since: Annotated[str, typer.Option(help="From when on; ISO time (local unless it names a zone) or seconds.")],
    until: Annotated[str | None, typer.Option(help="To when, likewise; now if not given.")] = None,
    actor: Actor = "operator",
    home: Home = HOME,
) -> None:
    """Remove what a robot produced, or handed in, between two times, for good; refuse what still comes of it."""
    from infra.snapshots import Snapshots

    first = _seconds("since", since)
    last = time.time() if until is None else _seconds("until", until)
    with _opened(home) as (catalog, _):
        snapshots = Snapshots(catalog)
        before = snapshots.latest()
        made = snapshots.revoke(robot, first, last, reason=reason, actor=actor)
    if made.version == before.version:
        out.print(f"{robot}: nothing of it is in snapshot {made.version}; what still comes is refused")
    else:
        out.print(f"{robot}: {made.removed} episodes removed by snapshot {made.version}, {made.episodes} remain")


@app.command()
def release(
    ids: Annotated[list[str] | None, typer.Argument(help="Episodes; all of the stage if none.")] = None,
    stage: Annotated[str | None, typer.Option(help="Only what was refused there, for example `contract`.")] = None,
    home: Home = HOME,
) -> None:
    """Send episodes from quarantine through the checks again, after a contract, a check or a limit was mended."""
    from infra.ingest import Ingest

    if not ids and stage is None:
        raise ConfigError("nothing to release", "name episodes, or a --stage; `lwd contracts review` shows them")
    releasable = sa.select(quarantine).where(quarantine.c.version.is_(None), quarantine.c.stage != "conflict")
    if stage is not None:
        releasable = releasable.where(quarantine.c.stage == stage)
    with _opened(home) as (catalog, objects):
        with catalog.read() as connection:
            rows = [row for row in connection.execute(releasable) if not ids or row.episode_id in ids]
        if missing := set(ids or ()) - {row.episode_id for row in rows}:
            raise ConfigError(
                f"episode {sorted(missing)[0]} cannot be released" + (f" from stage {stage}" if stage else ""),
                "release only what the coordinator refused; collect anew what was in a snapshot or in conflict",
            )
        ingest = Ingest(catalog, objects)
        for row in rows:
            ingest.release(row.episode_id, row.sha256)
    out.print(f"{len(rows)} episodes go through the checks again")


@app.command()
def verify(
    home: Home = HOME,
    read: Annotated[bool, typer.Option("--read", help="Read every object that is still needed as well.")] = False,
) -> None:
    """Compare catalog and store; exit code 3 if anything was lost, changed or is damaged.

    Looks at the catalog's file, its sequences, the chain of digests over all snapshots, stored objects without a row,
    and rows without their object.
    """
    from infra.audit import audit

    with _opened(home) as (catalog, objects):
        found = audit(catalog, objects, read=read)
    out.print(f"{found.versions} snapshots match their digests; the oldest kept whole is {found.floor}")
    out.print(
        f"{found.episodes} committed episodes, {found.objects} stored objects: {len(found.unrecorded)} objects have no "
        f"row, {len(found.missing)} rows have no object; {found.unaccounted} episodes wait for the coordinator"
    )
    _print_some("no row", [item.key for item in found.unrecorded])
    for kind in ("missing", "damaged", "unread"):
        _print_some(kind, [f"{identifier} {key}" for identifier, key in getattr(found, kind)])
    if read:
        out.print(f"{found.read} objects read, {len(found.missing) + len(found.damaged)} damaged")
    found.check()


def _print_some(label: str, lines: list[str], most: int = 20) -> None:
    for line in lines[:most]:
        out.print(f"{label}: {line}", soft_wrap=True)
    if len(lines) > most:
        out.print(f"{label}: {len(lines) - most} more")


@app.command()
def recover(home: Home = HOME, actor: Actor = "operator") -> None:
    """Commit again the stored episodes that the catalog lost; what cannot be read is listed and stays.

    The coordinator gives its verdict on them as on new ones.
    """
    from infra.recover import recover as bring_back

    with _opened(home) as (catalog, objects):
        done = bring_back(catalog, objects, actor=actor)
    for robot, count in sorted(done.by_robot.items()):
        out.print(f"{robot}: {count} episodes")
    _print_some("in quarantine, its id belongs to other bytes", done.conflicts)
    _print_some("left as it is", [f"{key}: {reason[:_REASON]}" for key, reason in done.left], most=1000)
    out.print(
        f"{done.episodes} episodes committed again, {len(done.conflicts)} put in quarantine, {len(done.left)} left"
    )


@app.command()
def discard(
    keys: Annotated[list[str], typer.Argument(help="Keys that `lwd data recover` has left.")], home: Home = HOME
) -> None:
    """Delete stored objects that are no episodes and that the catalog has no row of."""
    from infra.recover import discard as delete

    with _opened(home) as (catalog, objects):
        count = delete(catalog, objects, keys)
    out.print(f"{count} objects deleted")


@app.command("dead-letters")
def dead_letters(
    home: Home = HOME, last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 20
) -> None:
    """Records of the log that announce no episode: kept with the reason, passed over."""
    with _opened(home) as (catalog, _), catalog.read() as connection:
        total = connection.execute(sa.select(sa.func.count()).select_from(letters)).scalar_one()
        rows = list(connection.execute(sa.select(letters).order_by(letters.c.created_at.desc()).limit(last)))
    table = Table("log", "partition", "offset", "at", "reason", "payload")
    for row in rows:
        at = datetime.fromtimestamp(row.created_at).isoformat(" ", "seconds")
        payload = row.payload if len(row.payload) <= 60 else row.payload[:59] + "…"
        table.add_row(row.log, str(row.partition), str(row.position), at, row.reason, payload)
    out.print(table)
    out.print(f"{total} in all")


def _seconds(name: str, value: str) -> float:
    """ISO time or seconds since the epoch, as seconds."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(value).timestamp()
        except ValueError:
            seconds = math.nan
    if not math.isfinite(seconds):
        raise ConfigError(f"--{name} {value!r} is no time", "give 2026-11-22T08:00, or seconds since the epoch")
    return seconds
