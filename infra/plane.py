"""One deployment's catalog, objects and log, opened as its settings say: the one place that tells profiles apart."""

from __future__ import annotations

import threading

from infra.catalog import Catalog
from infra.errors import ConfigError
from infra.events import EventLog
from infra.events.outbox import OutboxLog
from infra.objects import ObjectStore
from infra.objects.directory import DirectoryStore
from infra.process import patiently
from infra.settings import Settings


def open_catalog(settings: Settings, *, migrate: bool = False, stop: threading.Event | None = None) -> Catalog:
    """The catalog, its tables checked.

    Args:
        migrate: make the tables where there are none; the local profile's are upgraded, too. A fleet's are upgraded by
            `lwd migrate` alone: processes of the version before may be at work.
        stop: of a long-lived process: a database that is away is waited for until it is set.

    Raises:
        ConfigError: its tables are not of this version.
        UnavailableError: the database does not answer.
    """
    catalog = Catalog(settings.catalog_url)

    def prepare() -> None:
        if migrate and (settings.profile == "local" or catalog.revision() is None):
            catalog.migrate()
        catalog.check()

    try:
        if stop is None:
            prepare()
        else:
            patiently(prepare, stop)
    except BaseException:
        catalog.close()
        raise
    return catalog


def open_objects(settings: Settings) -> ObjectStore:
    """The object store."""
    if settings.profile == "local":
        return DirectoryStore(settings.objects_dir)
    from infra.objects.s3 import S3Store

    if settings.s3_endpoint is None or settings.s3_access_key is None or settings.s3_secret_key is None:
        raise ConfigError(
            "the object store of a fleet needs s3_endpoint, s3_access_key and s3_secret_key",
            f"set them in {settings.home / 'settings.yaml'}",
        )
    return S3Store(
        settings.s3_endpoint,
        settings.s3_bucket,
        access_key=settings.s3_access_key,
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
        timeout_s=settings.s3_timeout_s,
        pool=settings.s3_pool,
    )


def open_events(settings: Settings, catalog: Catalog) -> EventLog:
    """The log of committed episodes, for a consumer."""
    if settings.profile == "local":
        return OutboxLog(catalog)
    from infra.events.kafka import KafkaLog

    if settings.kafka_bootstrap is None:
        raise ConfigError("the log of a fleet needs kafka_bootstrap", f"set it in {settings.home / 'settings.yaml'}")
    return KafkaLog(catalog, settings.kafka_bootstrap, settings.kafka_topic, settings.kafka_options)
