"""The ingest service as a process: `python -m infra.service --home runs/local`. SIGTERM ends it, requests finished."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from infra.errors import ConfigError, LwdError
from infra.plane import open_catalog, open_objects
from infra.process import FloodFilter, log_to, process_arguments, run_process
from infra.service.app import make_app
from infra.service.listen import Listener
from infra.settings import load_settings
from infra.telemetry import metrics, tracing

_LINES, _LINES_PER_S = 200.0, 20.0  # of one kind: robots, and strangers, make the service log


def _serve(home: Path, stop: threading.Event) -> None:
    settings = load_settings(home=home)
    log_to(settings.logs_dir, "service", flood=FloodFilter(_LINES, _LINES_PER_S))
    metrics.serve(settings, "service")
    tracing.start("service")
    if settings.profile == "fleet" and settings.catalog is None:
        raise ConfigError("the service of a fleet needs its catalog", f"set it in {settings.home / 'settings.yaml'}")
    listener = Listener(settings)
    try:
        with closing(open_catalog(settings, migrate=True, stop=stop)) as catalog:
            listener.serve(make_app(settings, catalog, open_objects(settings)))
    except LwdError:
        if not stop.is_set():
            raise
    finally:
        listener.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; exit code of the error otherwise."""
    parser = process_arguments("infra.service", "Take in robots' episodes over HTTP.")
    options = parser.parse_args(arguments)
    return run_process(options, lambda stop: _serve(options.home, stop))


if __name__ == "__main__":
    sys.exit(main())
