"""Renews permissions: `python -m infra.policy.renew --home runs/demo`, beside the signing key.

While it runs, robots may run what their cohort was told to, and the champion. When it stands still, permissions end one
after the other: the canary's first, then the learning cohort's, at last the champion's. Of several, the one that holds
the lease renews; the others wait.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Sequence

from infra.catalog import Catalog
from infra.catalog.leases import Lease
from infra.errors import LeaseLostError
from infra.plane import open_catalog
from infra.policy.keys import SIGNING, Signer, load_signer
from infra.policy.permission import Permission, Validity
from infra.policy.permit import RENEW_AT, permit
from infra.process import log_to, patiently, process_arguments, run_process
from infra.settings import Settings, load_settings
from infra.telemetry import metrics

_PAUSE_MAX_S = 20.0
log = logging.getLogger(__name__)


def validity_of(settings: Settings) -> Validity:
    """How long permissions last, by the settings."""
    return Validity(settings.permit_canary_s, settings.permit_learning_s, settings.permit_champion_s)


class Renewer:
    """Looks at what is due.

    Args:
        catalog: where permissions lie.
        settings: their validity; the folder of the signing key, which is read again at each look, so that a rotated
            key signs at once.
    """

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._catalog = catalog
        self._settings = settings
        self._validity = validity_of(settings)
        self.lease = Lease(catalog, "renewer", settings.lease_s)
        shortest = min(self._validity.canary, self._validity.learning, self._validity.champion)
        self.pause_s = min(shortest / RENEW_AT / 4, settings.lease_s / 3, _PAUSE_MAX_S)

    def step(self) -> list[Permission]:
        """Sign what is due; the permissions that were signed.

        Raises:
            LeaseLostError: another process renews.
            ConfigError: there is no signing key here.
            UnavailableError, StorageFullError: the catalog did not take it.
        """
        self.lease.acquire()
        keys = self._settings.keys_dir
        signers: dict[tuple[str, ...], Signer] = {("learning",): load_signer(keys, "publish")}
        if (keys / SIGNING["promote"]).exists():  # else this machine only learns
            signers["canary", "production"] = load_signer(keys)
        with self._catalog.begin() as connection:
            self.lease.guard(connection)
            return [
                signed
                for cohorts, signer in signers.items()
                for signed in permit(connection, signer, self._validity, cohorts=cohorts)
            ]


def _serve(options: argparse.Namespace, stop: threading.Event) -> None:
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, "renewer")
    metrics.serve(settings, "renewer")
    renewer = Renewer(open_catalog(settings, stop=stop), settings)
    told = ""
    while not stop.is_set():
        try:
            for permission in patiently(renewer.step, stop):
                said = f"{permission.cohort}/{permission.role}: policy {permission.version}"
                log.info("renewed", extra={"fields": {"permission": said, "until": permission.valid_until}})
            told = ""
        except LeaseLostError as error:
            if error.problem.partition(" for another")[0] != told:
                told = error.problem.partition(" for another")[0]
                log.info("standing by: %s", told)
        stop.wait(renewer.pause_s)
    renewer.lease.release()


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew until SIGTERM; exit code of the error otherwise."""
    options = process_arguments("infra.policy.renew", "Renew permissions of policies.").parse_args(arguments)
    return run_process(options, lambda stop: _serve(options, stop), label="renewer")


if __name__ == "__main__":
    sys.exit(main())
