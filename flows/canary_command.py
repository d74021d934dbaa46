"""`lwd canary`: put a candidate on trial and watch it. Imports little, so that `lwd` starts at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.console import bold, out
from flows.run import run_flow
from infra.errors import ConfigError
from infra.settings import default_home

HOME = default_home()
EXIT_CODES = {"SAFE": 0, "CONTINUE": 10, "HARM": 11, "STOP": 12, "ENDED": 12}


def canary(
    version: Annotated[
        int | None, typer.Argument(help="Candidate; the one on trial, or else the newest, if not given.")
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="Canary's file; `flows/gates/canary.yaml` if not given.")] = None,
    once: Annotated[
        bool, typer.Option("--once", help="One look at what is on trial, and what follows from it.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the trial: the champion comes back.")] = False,
    reason: Annotated[str, typer.Option(help="With --stop: why; goes into the audit.")] = "",
    actor: Annotated[str, typer.Option(help="With --stop: who.")] = "operator",
    home: Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")] = HOME,
    port: Annotated[
        int | None, typer.Option(help="Port of the Prefect server started for this command; any free one.")
    ] = None,
) -> None:
    """Try a candidate on the canary cohort; a regression is sent back by itself. Exit code 0 SAFE, 11 HARM.

    10 is CONTINUE (with --once), 12 a trial that ended without an answer. Interrupted, the same command goes on.
    """
    if (stop or once) and (version is not None or (stop and (once or gate))):
        which = "--stop" if stop else "--once"
        raise ConfigError(
            f"{which} is of what is on trial, and takes no other candidate or option", f"give {which} alone"
        )
    if reason and not stop:
        raise ConfigError(
            "--reason says why a trial was stopped, and nothing is to be stopped", "add --stop, or leave it out"
        )
    if stop:
        _stop(home, reason or "not given", actor)
        return
    if once:
        answer = _look(home, gate)
    else:
        answer = run_flow("canary", home, port, home=str(home), version=version, gate=str(gate) if gate else None)
    _show(answer)
    raise typer.Exit(EXIT_CODES[answer["answer"]])


def _stop(home: Path, reason: str, actor: str) -> None:
    from flows.canary import stop_trial
    from flows.deployment import deployment

    with deployment(home) as plane:
        out.print(f"policy v{stop_trial(plane, reason, actor=actor)} is no longer on trial; the champion comes back")


def _look(home: Path, gate: Path | None) -> dict[str, Any]:
    from flows.canary import Watcher
    from flows.canary_gate import DEFAULT_CANARY, load_canary
    from flows.deployment import deployment
    from infra.errors import ConfigError

    with deployment(home) as plane:
        look = Watcher(plane, load_canary(gate or DEFAULT_CANARY)).look()
    if look is None:
        raise ConfigError("no policy is on trial", "start one: `lwd canary VERSION`")
    return {
        "version": look.trial.version,
        "answer": str(look.answer),
        "reasons": list(look.decision.reasons),
        "acted": look.acted,
        "rows": look.rows(),
    }


def _show(answer: dict[str, Any]) -> None:
    out.print(bold(answer["answer"]), f": policy v{answer['version']} {answer['acted']}".rstrip(), sep="")
    for line in answer["reasons"]:
        out.print(f"  {line}")
    if rows := answer["rows"]:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        out.print(table)
