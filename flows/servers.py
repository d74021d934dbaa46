"""`lwd servers`: Kafka, S3 and PostgreSQL on this machine, without containers, for a home in the fleet profile."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.console import out, say
from flows.once import App
from infra.errors import ConfigError, UnavailableError
from infra.settings import default_home

if TYPE_CHECKING:  # the servers' clients take a second to import, which no other command should wait for
    from infra.servers import Servers
    from infra.servers.server import Server

app = App(no_args_is_help=True, help="Real servers on this machine: Kafka, Garage (S3), PostgreSQL, Prefect.")

Data = Annotated[Path | None, typer.Option(help="Folder of the servers' data; beside the programs if not given.")]
Only = Annotated[str | None, typer.Option(help="For example postgres,kafka; all of them if not given.")]


@app.command()
def prepare(only: Only = None) -> None:
    """Get the programs, once: Kafka's jars by Maven, Garage by cargo (ten minutes), PostgreSQL from the system."""
    from infra.servers import servers_folder

    for server in _chosen(_servers(), only):
        if not server.prepared:
            say(f"{server.name} {server.wanted}: getting it …")
        server.prepare()
        say(f"{server.name} {server.version} is here")
    say(f"programs: {servers_folder() / 'programs'}")


@app.command()
def up(
    home: Annotated[Path, typer.Option(help="Deployment whose settings.yaml will name them.")] = default_home(),  # noqa: B008
    only: Only = None,
    data: Data = None,
    port: Annotated[
        list[str] | None, typer.Option(help="For example kafka=9092; a free one, kept, for those not named.")
    ] = None,
) -> None:
    """Start them, wait until they serve, and point a deployment at them."""
    from infra.servers import write_settings

    servers = _servers(data, _ports(port or []))
    chosen = _chosen(servers, only)
    names = [server.name for server in chosen]
    for server in chosen:
        server.start()
        say(f"{server.name:<9} 127.0.0.1:{server.port}")
    out.print(f"settings: {write_settings(home, servers.settings(names))}", soft_wrap=True)
    if "prefect" in names:
        _say_how_to_reach(servers.prefect.api_url, servers.prefect.data)
    out.print(f"next:     lwd migrate --home {home}; lwd online --home {home}", soft_wrap=True)


@app.command()
def prefect(
    home: Annotated[Path, typer.Option(help="Deployment; tables and credential lie in its folder `prefect`.")] = (
        default_home()  # noqa: B008
    ),
    port: Annotated[int, typer.Option(help="Where it listens, on loopback.")] = 4200,
) -> None:
    """Run a Prefect server for workers and schedules until Ctrl-C: on loopback, with a credential."""
    import time

    from flows.prefect_server import prefect_server
    from infra.exclusive import exclusive
    from infra.lifeline import lifeline
    from infra.servers.toolchain import http_status

    if url := os.environ.get("PREFECT_API_URL"):
        raise ConfigError(f"PREFECT_API_URL names the server {url}", "unset PREFECT_API_URL to run one here")
    folder = home / "prefect"
    with exclusive(folder / "server.lock", f"Prefect's server of {home}") as lock, lifeline([lock]):
        say("starting Prefect …")
        with prefect_server(folder, port=port) as url:
            _say_how_to_reach(url, folder)
            while http_status(f"{url}/health") is not None:
                time.sleep(2.0)
    raise UnavailableError("Prefect's server has ended", f"read {folder / 'server.log'} for the cause")


@app.command()
def down(only: Only = None, data: Data = None) -> None:
    """Stop them; their data stays."""
    for server in reversed(_chosen(_servers(data), only)):
        server.stop()
        say(f"{server.name} stopped")


@app.command()
def status(data: Data = None) -> None:
    """What runs, where, and how much it holds; exit code 1 if one has crashed."""
    table, crashed = Table("server", "version", "state", "pid", "port", "data"), False
    for server in _servers(data).all():
        pid, known = server.pid, (server.data / "port").exists()
        state = "serves" if server.ready() else "starting" if pid else "crashed" if server.crashed else "stopped"
        crashed |= state == "crashed"
        table.add_row(
            server.name, server.version, state, str(pid or ""), str(server.port) if known else "", _size(server.data)
        )
    out.print(table)
    raise typer.Exit(1 if crashed else 0)


def _say_how_to_reach(api_url: str, folder: Path) -> None:
    """What a terminal needs in which `prefect` and `lwd` use this server; the credential itself is not shown."""
    from infra.servers.prefect import CREDENTIAL

    path = shlex.quote(str((folder / CREDENTIAL).resolve()))
    out.print("Prefect, in each terminal that uses it:", soft_wrap=True)
    out.print(f"  export PREFECT_API_URL={api_url}", soft_wrap=True)
    out.print(f'  export PREFECT_API_AUTH_STRING="$(cat {path})"', soft_wrap=True)
    out.print(f"  its pages: {api_url.removesuffix('/api')}, which ask for the same", soft_wrap=True)


def _servers(data: Path | None = None, ports: dict[str, int] | None = None) -> Servers:
    from infra.servers import Servers

    return Servers(data, ports=ports)


def _chosen(servers: Servers, only: str | None) -> list[Server]:
    return servers.all() if only is None else servers.all(only.split(","))


def _ports(given: list[str]) -> dict[str, int]:
    ports = {}
    for pair in given:
        name, _, number = pair.partition("=")
        if not number.isascii() or not number.isdigit() or not 0 < int(number) < 65_536:
            raise ConfigError(f"--port {pair!r} names no port", "write it as kafka=9092")
        if name in ports:
            raise ConfigError(f"--port gives {name} two ports", "keep one of the two")
        ports[name] = int(number)
    return ports


def _size(folder: Path) -> str:
    """What its files occupy; they come and go while a server runs."""
    used = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            used += path.lstat().st_blocks * 512
    return f"{used / 2**20:.0f} MiB"
