"""`lwd data`: what a steward or an operator does with the data of a deployment, beside its running processes."""

from __future__ import annotations

import hashlib
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
from infra.catalog import Catalog
from infra.catalog.schema import dead_letters as letters
from infra.catalog.schema import quarantine
from infra.errors import ConfigError, CorruptDataError
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.settings import default_home, load_settings

app = typer.Typer(no_args_is_help=True, help="The data of a deployment: mend, free, revoke, release, verify.")
Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
Actor = Annotated[str, typer.Option(help="Who decides; goes into the audit.")]
HOME = default_home()
DAY_S = 86_400.0


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
    """Announce again what a broker lost, ask again for lost objects, delete what was stored but never committed."""
    from infra.reconcile import reconcile as mend

    with _opened(home) as (catalog, objects):
        found = mend(catalog, objects, grace_s=grace_s)
    table = Table("announced again", "objects lost", "orphans deleted", "uploads deleted")
    table.add_row(
        str(found.announced_again), str(found.objects_lost), str(found.orphans_deleted), str(found.incoming_deleted)
    )
    out.print(table)


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
    read: Annotated[bool, typer.Option("--read", help="Read every object of the current snapshot as well.")] = False,
) -> None:
    """Recompute the chain of digests over all snapshots; exit code 3 if anything was changed or is damaged."""
    from infra.snapshots import Snapshots

    with _opened(home) as (catalog, objects):
        snapshots = Snapshots(catalog)
        versions = snapshots.verify()
        out.print(f"{versions} snapshots match their digests; the oldest kept whole is {snapshots.floor()}")
        if not read:
            return
        members, damaged = snapshots.episodes(versions), 0
        for member in members:
            try:
                found = hashlib.sha256(objects.get(member.key)).hexdigest()
            except CorruptDataError:
                found = "gone"
            if found != member.sha256:
                damaged += 1
                out.print(f"{member.episode_id} {member.key}: {found}")
    out.print(f"{len(members)} objects read, {damaged} damaged")
    if damaged:
        raise CorruptDataError(
            f"{damaged} objects of snapshot {versions} are damaged or gone",
            "restore them from the bucket's backup; else the readers withdraw them by a new snapshot when they come",
        )


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
