"""`lwd keys`: the keys that sign policies, changed with an overlap so that no robot is left without a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from infra.errors import ConfigError
from infra.settings import default_home

if TYPE_CHECKING:
    from flows.deployment import Deployment

app = typer.Typer(no_args_is_help=True, help="Keys that sign policies: list, rotate, retire.")
out = Console(highlight=False)
Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
HOME = default_home()


@app.command("list")
def list_keys(home: Home = HOME) -> None:
    """List the trusted keys: which one signs, and what robots run that is signed by each."""
    from flows.deployment import deployment
    from infra.policy.keys import NEXT, SIGNING, key_at, trusted_ids

    with deployment(home) as plane:
        keys = plane.settings.keys_dir
        roles = {key_at(keys / name): role for name, role in ((NEXT, "signs next"), (SIGNING, "signs"))}
        held = in_use(plane)
        table = Table("key", "role", "signed")
        for identity in trusted_ids(keys):
            table.add_row(identity, roles.get(identity, "trusted"), "; ".join(held.get(identity, [])))
    out.print(table)


@app.command()
def rotate(
    stage: Annotated[
        bool, typer.Option("--stage", help="Only make the next key and trust it; bring `keys/trusted` to the robots.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Sign with a new key from now on; the old one stays trusted and nothing is announced again.

    With a fleet: first `--stage`, bring `keys/trusted` to every robot, then rotate, and restart what publishes.
    """
    from flows.deployment import deployment
    from infra.policy.keys import rotate_key, stage_key

    with deployment(home) as plane:
        if stage:
            identity = stage_key(plane.settings.keys_dir)
            out.print(f"{identity} will sign next and is trusted; bring keys/trusted/{identity}.pub to every robot")
            return
        old, new = rotate_key(plane.settings.keys_dir)
    out.print(f"{new} signs from now on; {old} stays trusted until `lwd keys retire {old}`")
    out.print("restart what publishes (learner, flows): a process that is running goes on with the old key")


@app.command()
def retire(key: Annotated[str, typer.Argument(help="Key id; see `lwd keys list`.")], home: Home = HOME) -> None:
    """Trust a key no more; refused while anything that robots run or go back to is signed by it."""
    from flows.deployment import deployment
    from infra.policy.keys import retire_key

    with deployment(home) as plane:
        if held := in_use(plane).get(key):
            raise ConfigError(
                f"the key {key} signed {'; '.join(held)}",
                "promote policies published since the rotation first, until nothing that robots need is of this key",
            )
        retire_key(plane.settings.keys_dir, key)
        out.print(f"{key} is trusted no more; remove keys/trusted/{key}.pub on every robot")


@app.command()
def reset(
    reason: Annotated[str, typer.Option(help="Why; kept with the reset.")],
    actor: Annotated[str, typer.Option(help="Who.")],
    home: Home = HOME,
) -> None:
    """Begin the numbers of announcements anew, signed: for robots that take every announcement for a replay.

    After a number that was signed in error, or a catalog that was restored from a backup. Robots take nothing that was
    signed before it; robots of a version that knows no resets refuse what comes after it, and must be upgraded.
    """
    from flows.deployment import deployment

    with deployment(home) as plane:
        epoch = plane.registry.reset(actor=actor, reason=reason)
    out.print(f"epoch {epoch} of announcements began; robots follow within a minute of their next contact")


def in_use(plane: Deployment) -> dict[str, list[str]]:
    """By key id, what it signed that robots run, go back to, or read when they join: policies and announcements."""
    import sqlalchemy as sa

    from infra.catalog import schema
    from infra.policy.artifact import SIGNATURE
    from infra.policy.keys import signed_by
    from infra.policy.registry import Alias

    wanted: dict[int, list[str]] = {}
    held: dict[str, list[str]] = {}
    for name in get_args(Alias):
        if (version := plane.registry.alias(name)) is not None:
            wanted.setdefault(version, []).append(name)
    table = schema.announcements
    newest = sa.select(sa.func.max(table.c.seq)).group_by(table.c.cohort)
    with plane.catalog.read() as connection:
        for row in connection.execute(sa.select(table).where(table.c.seq.in_(newest)).order_by(table.c.cohort)):
            wanted.setdefault(row.version, []).append(f"run by {row.cohort}")
            identity = signed_by(str((row.authorisation or {}).get("signature", "")))
            held.setdefault(identity, []).append(f"the announcement of policy {row.version} to {row.cohort}")
        prefixes = {
            row.version: row.bundle_key
            for row in connection.execute(sa.select(schema.policies).where(schema.policies.c.version.in_(wanted)))
        }
    for version, names in sorted(wanted.items()):
        identity = signed_by(plane.objects.get(f"{prefixes[version]}/{SIGNATURE}").decode("ascii"))
        held.setdefault(identity, []).insert(0, f"policy {version} ({', '.join(names)})")
    return held
