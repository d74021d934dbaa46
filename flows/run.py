"""Running a flow from a command: with the Prefect server that is named, or one for the length of the run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import pipeline
from flows.console import say
from flows.params import load_params
from infra import interrupts
from infra.exclusive import exclusive
from infra.lifeline import lifeline
from infra.loopback import ask_directly

_PIPELINE = {"demo", "collect", "offline"}  # flows that run stages of dvc.yaml


def run_flow(
    name: str, home: Path, port: int | None, /, *, before: Callable[[], None] | None = None, **arguments: Any
) -> Any:
    """Run a Prefect flow by name, with a server of its own unless PREFECT_API_URL names one.

    `before` is done first, once no other command can be at work on the same.

    Whichever way this ends, nothing that it started lives on, and no second command runs the same flow beside it.

    Raises:
        ConfigError: no pipeline or no valid parameters where the flow needs them; said before a server is started.
        LeaseLostError: another command runs it; its process is named.
        Stopped: by a signal. Nothing is retried, and nothing is recorded as a failure.
    """
    ask_directly()
    if name in _PIPELINE:
        pipeline.stages(arguments.get("until"))
    if "params_path" in arguments:
        load_params(Path(arguments["params_path"]))
    from flows.prefect_server import prefect_server, require_port

    require_port(port)
    with contextlib.ExitStack() as held:
        locks = [held.enter_context(exclusive(home / f"{name}.lock", f"`lwd {name}` of {home}"))]
        if name in _PIPELINE and (lock := held.enter_context(pipeline.alone("training"))) is not None:
            locks.append(lock)
        held.enter_context(lifeline(locks))
        if before is not None:
            before()
        say("starting Prefect …")
        with prefect_server(home / "prefect", port=port):
            import flows.all as everything

            _keep_our_handler()
            interrupts.check()
            answer = getattr(everything, name)(**arguments)
            interrupts.check()
            return answer


def _keep_our_handler() -> None:
    """Have Prefect's engine install our handler of SIGTERM where it would its own.

    Its own ends the process by sending it the signal a second time, before anything is unwound.
    """
    from prefect.utilities import engine

    if interrupts.installed() and hasattr(engine, "_prefect_sigterm_handler"):
        engine._prefect_sigterm_handler = interrupts.handle


def start_over(run_dir: Path) -> None:
    """Forget a run; the pipeline's data and models stay, DVC knows whether they are up to date."""
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".lock":  # this command's own
            path.unlink()
