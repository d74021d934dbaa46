"""`lwd keys`: the keys that sign policies, changed with an overlap so that no robot is left without a policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from flows.console import out
from flows.once import App
from infra.errors import ConfigError
from infra.settings import default_home

if TYPE_CHECKING:
    from flows.deployment import Deployment
    from infra.policy.keys import Role

app = App(no_args_is_help=True, help="Keys that sign policies: list, rotate, retire.")
Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
HOME = default_home()


@app.command("list")
def list_keys(home: Home = HOME) -> None:
    """List the trusted keys: which one signs, and what robots run that is signed by each."""
    from flows.deployment import deployment
    from infra.policy.keys import NEXT, SIGNING, key_at, trusted_ids

    with deployment(home) as plane:
        keys = plane.settings.keys_dir
        states = {key_at(keys / name): "signs next" for name in NEXT.values()}
        states |= {key_at(keys / name): "signs" for name in SIGNING.values()}
        held = in_use(plane)
        table = Table("key", "may", "state", "signed")
        for identity, role in trusted_ids(keys).items():
            table.add_row(identity, role, states.get(identity, "trusted"), "; ".join(held.get(identity, [])))
    out.print(table)


@app.command()
def rotate(
    stage: Annotated[
        bool, typer.Option("--stage", help="Only make the next key and trust it; bring `keys/trusted` to the robots.")
    ] = False,
    role: Annotated[
        str, typer.Option(help="Whose key: `promote`, the deployment's, or `publish`, the learner's.")
    ] = "promote",
    home: Home = HOME,
) -> None:
    """Sign with a new key from now on; the old one stays trusted and nothing is announced again.

    With a fleet: first `--stage`, bring `keys/trusted` to every robot, then rotate, and restart what publishes.
    """
    from flows.deployment import deployment
    from infra.policy.keys import rotate_key, stage_key

    chosen = _role(role)
    with deployment(home) as plane:
        if stage:
            identity = stage_key(plane.settings.keys_dir, chosen)
            out.print(f"{identity} will sign next and is trusted; bring the folder keys/trusted to every robot")
            return
        old, new = rotate_key(plane.settings.keys_dir, chosen)
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
        out.print(f"{key} is trusted no more; remove {key}.pub below keys/trusted on every robot")


@app.command("new-person")
def new_person(
    key: Annotated[Path, typer.Argument(help="Where your private key goes; the public one beside it.")],
) -> None:
    """Make a key of your own, to approve promotions with. Keep the private half to yourself, outside the deployment."""
    from infra.policy.approval import create_person_key

    out.print(f"{create_person_key(key)}: give {key.with_suffix('.pub')} to who administers the deployment")


@app.command("enrol-person")
def enrol_person(
    name: Annotated[str, typer.Argument(help="The person's name: letters, digits, '-', '_', '.'.")],
    public_key: Annotated[Path, typer.Argument(help="The file of that person's public key.")],
    home: Home = HOME,
) -> None:
    """Let a person approve promotions of this deployment."""
    from infra.policy.approval import enrol_person as enrol
    from infra.settings import load_settings

    out.print(f"{name} may approve, with the key {enrol(load_settings(home=home).keys_dir, name, public_key)}")


@app.command("people")
def list_people(home: Home = HOME) -> None:
    """List who may approve promotions."""
    from infra.policy.approval import people
    from infra.settings import load_settings

    table = Table("name", "key")
    for name, identity in people(load_settings(home=home).keys_dir).items():
        table.add_row(name, identity)
    out.print(table)


def _role(name: str) -> Role:
    from infra.policy.keys import Role

    roles = get_args(Role)
    if name not in roles:
        raise ConfigError(f"there is no role {name!r}", f"use one of: {', '.join(roles)}")
    chosen: Role = name  # type: ignore[assignment]
    return chosen


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
