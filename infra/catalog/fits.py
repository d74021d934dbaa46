"""Whether a row fits its table, asked of the table's own columns before the database is: one place, for every column.

SQLite takes text of any length where PostgreSQL refuses it, and neither says which value is wrong. What comes from a
robot is held against this, so that a contract which asks for less stops nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from infra.errors import named

MAX_TEXT_CHARS = 2**16  # of a column without a length, and of a JSON document
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL refuses NUL, UTF-8 half of a surrogate pair


def misfit(table: sa.Table, values: Mapping[str, Any]) -> str | None:
    """What keeps the values from being a row of the table, naming the column; None where they fit.

    Columns that are absent from `values` are not looked at: their defaults are the table's.
    """
    for name, value in values.items():
        if wrong := _misfit(table.c[name], value):
            return f"{name} {wrong}"
    return None


def _misfit(column: sa.Column[Any], value: Any) -> str | None:
    kind = column.type
    if value is None:
        return None if column.nullable else "is missing"
    if isinstance(kind, sa.JSON):
        return _json_misfit(value)
    if isinstance(kind, sa.String):
        return _text_misfit(value, kind.length or MAX_TEXT_CHARS)
    if isinstance(kind, sa.Integer):  # BigInteger is one, too
        bits = 63 if isinstance(kind, sa.BigInteger) else 31
        whole = type(value) is int and -(2**bits) <= value < 2**bits
        return None if whole else f"is {named(value)}, not a whole number of {bits + 1} bits"
    if isinstance(kind, sa.Float):
        number = type(value) in (int, float) and abs(value) < 2**1023 and math.isfinite(value)
        return None if number else f"is {named(value)}, not a finite number"
    return None


def _text_misfit(value: Any, length: int) -> str | None:
    if not isinstance(value, str):
        return f"is {named(value)}, not text"
    if len(value) > length:
        return f"has {len(value)} characters, over {length}"
    return f"is {named(value)}: no database holds such text" if _UNSTORABLE.search(value) else None


def _json_misfit(value: Any) -> str | None:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        return f"is not JSON ({named(str(error))})"
    if len(text) > MAX_TEXT_CHARS:
        return f"has {len(text)} characters of JSON, over {MAX_TEXT_CHARS}"
    return "holds text that no database takes" if _UNSTORABLE.search(text) or "\\u0000" in text else None
