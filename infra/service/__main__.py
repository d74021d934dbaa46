"""The ingest service as a process: `python -m infra.service --home runs/local`. SIGTERM ends it, requests finished."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infra import metrics, tracing
from infra.errors import ConfigError, LwdError
from infra.plane import open_catalog, open_objects
from infra.process import die_with_parent, log_to, stop_on_signal
from infra.service.app import make_app
from infra.service.listen import Listener
from infra.settings import load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; exit code of the error otherwise."""
    parser = argparse.ArgumentParser(prog="python -m infra.service", description="Take in robots' episodes over HTTP.")
    parser.add_argument("--home", type=Path, required=True, help="the deployment")
    parser.add_argument("--parent", type=int, help="stop when this process, which started this one, ends")
    options = parser.parse_args(arguments)
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    try:
        settings = load_settings(home=options.home)
        settings.home.mkdir(parents=True, exist_ok=True)
        log_to(settings.logs_dir, "service")
        metrics.serve(settings, "service")
        tracing.start("service")
        if settings.profile == "fleet" and settings.catalog is None:
            raise ConfigError(
                "the service of a fleet needs its catalog", f"set it in {settings.home / 'settings.yaml'}"
            )
        listener = Listener(settings)
        catalog = open_catalog(settings, migrate=True, stop=stop)
        try:
            listener.serve(make_app(settings, catalog, open_objects(settings)))
        finally:
            listener.close()
            catalog.close()
    except LwdError as error:
        if stop.is_set():
            return 0
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
