"""What the metrics know of a store: how long its operations take, how many bytes they move, how they fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError
from infra.telemetry import metrics

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


def metered(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Count the calls of a store's method, under its name; free while metrics are off."""
    operation = method.__name__

    @wraps(method)
    def counted(store: S, /, *arguments: P.args, **named: P.kwargs) -> R:
        if not metrics.enabled():
            return method(store, *arguments, **named)
        try:
            with metrics.OBJECT_SECONDS.time(operation=operation):
                result = method(store, *arguments, **named)
        except LwdError as error:
            metrics.OBJECT_ERRORS.inc(operation=operation, kind=_kind(error))
            raise
        moved = result if operation == "get" else arguments[1] if operation == "put" and len(arguments) > 1 else None
        if isinstance(moved, bytes | Path):
            metrics.OBJECT_BYTES.inc(_size(moved), operation=operation)
        return result

    return counted


def _kind(error: LwdError) -> str:
    if isinstance(error, StorageFullError):
        return "full"
    if isinstance(error, ConfigError):
        return "refused"
    return "corrupt" if isinstance(error, CorruptDataError) else "unavailable"


def _size(moved: bytes | Path) -> int:
    return len(moved) if isinstance(moved, bytes) else moved.stat().st_size
