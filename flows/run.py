"""Running a flow from a command: with the Prefect server that is named, or one for the length of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.console import say


def run_flow(name: str, home: Path, port: int | None, /, **arguments: Any) -> Any:
    """Run a Prefect flow by name, with a server of its own unless PREFECT_API_URL names one."""
    from flows.prefect_server import prefect_server

    say("starting Prefect …")
    with prefect_server(home / "prefect", port=port):
        import flows.all as everything

        return getattr(everything, name)(**arguments)
