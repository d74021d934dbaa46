"""Running a flow from a command: with the Prefect server that is named, or one for the length of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import pipeline
from flows.console import say
from flows.params import load_params

_PIPELINE = {"demo", "collect", "offline"}  # flows that run stages of dvc.yaml


def run_flow(name: str, home: Path, port: int | None, /, **arguments: Any) -> Any:
    """Run a Prefect flow by name, with a server of its own unless PREFECT_API_URL names one.

    Raises:
        ConfigError: no pipeline or no valid parameters where the flow needs them; said before a server is started.
    """
    if name in _PIPELINE:
        pipeline.stages(arguments.get("until"))
    if "params_path" in arguments:
        load_params(Path(arguments["params_path"]))

    from flows.prefect_server import prefect_server

    say("starting Prefect …")
    with prefect_server(home / "prefect", port=port):
        import flows.all as everything

        return getattr(everything, name)(**arguments)
