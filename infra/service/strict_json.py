"""JSON as every reader would understand it: no key twice, finite numbers of 64 bits, text that a database can hold."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from infra.errors import ConfigError

MAX_DEPTH = 16
MAX_VALUES = 8192  # about; the fullest heartbeat has 5,000, and 87,000 would keep every robot waiting for 0.1 s


def check(data: bytes) -> None:
    """Judge a request's body.

    Raises:
        ConfigError: it is no JSON, or JSON that two readers could take for different things, or of too many values.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ConfigError(f"the request's JSON has more than {MAX_VALUES} values", "send fewer at once")
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float,
            parse_int=_int,
        )  # fmt: skip
    except RecursionError:
        raise _nested() from None
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ConfigError(f"the request's body is no JSON ({str(error)[:80]})", "see /openapi.json") from None
    _walk(document)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ConfigError("the request's JSON has a key twice", "send each key once")
    return found


def _constant(word: str) -> NoReturn:
    raise ConfigError(f"the request's JSON has the number {word}", "send finite numbers")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ConfigError("the request's JSON has a number beyond a double", "send finite numbers")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ConfigError("the request's JSON has an integer beyond 64 bits", "send smaller numbers")
    return value


def _walk(document: object) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for item in level:
            if isinstance(item, str):
                _text(item)
            elif isinstance(item, dict):
                for key in item:
                    _text(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise _nested()


def _text(value: str) -> None:
    if value.isascii() and "\0" not in value:
        return
    try:
        plain = "\0" not in value and bool(value.encode("utf-8"))
    except UnicodeEncodeError:  # half of a surrogate pair
        plain = False
    if not plain:
        raise ConfigError("the request's JSON has text that no database holds", "send Unicode without NUL")


def _nested() -> ConfigError:
    return ConfigError(f"the request's JSON is nested more than {MAX_DEPTH} deep", "see /openapi.json")
