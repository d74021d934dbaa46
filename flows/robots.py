"""`lwd robots`: credentials of robots for the ingest service. A token is shown once, and can be revoked at any time."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.console import out, say
from flows.once import App
from infra.settings import Settings, default_home

if TYPE_CHECKING:
    from infra.service.auth import Tokens

app = App(no_args_is_help=True, help="Robots' credentials: enrol, revoke, list.")
Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
Robot = Annotated[str, typer.Argument(help="The robot's name: letters, digits, '-', '_', '.'.")]
HOME = default_home()


@app.command()
def enrol(
    robot: Robot,
    cohort: Annotated[str, typer.Option(help="Whose policies: learning, canary or production.")] = "learning",
    days: Annotated[float, typer.Option(help="How long the token is valid.")] = 30.0,
    actor: Annotated[str | None, typer.Option(help="Who enrols it, for the list; you, if not given.")] = None,
    home: Home = HOME,
) -> None:
    """Print a new token for a robot, alone on stdout. It is kept nowhere and cannot be shown again.

    Tokens that the robot has stay valid: enrol, bring the new one to the robot, then revoke the old one by its id.
    """
    with _tokens(home) as (tokens, settings):
        token = tokens.enrol(robot, cohort, days=days, actor=actor or getpass.getuser())
    typer.echo(token)
    url = settings.ingest_url or "https://<this machine>:" + str(settings.ingest_port)
    say(f"give {robot} LWD_ROBOT_TOKEN=<the token>, LWD_INGEST_URL={url} and a copy of {settings.keys_dir}/trusted")


@app.command()
def revoke(
    robot: Robot,
    token: Annotated[str | None, typer.Option(help="Only the token with this id; see `lwd robots list`.")] = None,
    home: Home = HOME,
) -> None:
    """Refuse a robot's tokens from now on; running services do so within seconds.

    What it has handed in stays: withdraw that by a snapshot, if it is bad.
    """
    from infra.errors import ConfigError
    from infra.service.auth import CACHE_S

    with _tokens(home) as (tokens, _):
        valid = tokens.revoke(robot, token)
        if not valid and robot not in {row.robot_id for row in tokens.list()}:
            raise ConfigError(f"there is no robot {robot}", "see `lwd robots list`")
    out.print(f"{valid} valid token{'' if valid == 1 else 's'} of {robot} revoked; in force within {CACHE_S:.0f} s")


@app.command("list")
def list_robots(
    everything: Annotated[bool, typer.Option("--all", help="Expired and revoked tokens too.")] = False,
    home: Home = HOME,
) -> None:
    """List robots and their tokens' ids, never the tokens."""
    with _tokens(home) as (tokens, _):
        table = Table("robot", "cohort", "token id", "state", "enrolled", "by", "until")
        for row in tokens.list():
            if everything or row.state == "valid":
                until = row.expires_at if row.revoked_at is None else row.revoked_at
                table.add_row(
                    row.robot_id, row.cohort, row.token_id, row.state, _day(row.created_at), row.actor, _day(until)
                )
    out.print(table)


@contextmanager
def _tokens(home: Path) -> Iterator[tuple[Tokens, Settings]]:
    from infra.plane import open_catalog
    from infra.service.auth import Tokens
    from infra.settings import load_settings

    settings = load_settings(home=home)
    catalog = open_catalog(settings, migrate=True)
    try:
        yield Tokens(catalog), settings
    finally:
        catalog.close()


def _day(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
