"""A caller's values at the edge: numbers are taken as numbers, whatever library made them, or refused by name.

Robots' SDKs and simulators give numpy scalars, 0-d arrays, tensors, enums. A required field that cannot be taken is a
ConfigError at the call that gave it. `extra` is a note: what JSON cannot hold in it is replaced by a text and named,
because no attempt should be lost for a note.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import json
import math
import operator
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError

MAX_TEXT = 4096  # characters of a name or a sentence
MAX_EXTRA = 64 * 1024  # bytes of `extra` as JSON
_MAX_DEPTH, _MAX_ITEMS, _MAX_KEY = 16, 4096, 200
_MAX_VALUES = MAX_EXTRA // 2  # of an entry of `extra`: more do not fit, each takes two bytes
_WIDEST = 2**63


def number(value: Any, name: str) -> float:
    """A finite float of an int, a float, a truth value, a numpy scalar, or anything that converts like a tensor.

    Raises:
        ConfigError: a text, None, several values, a complex or a masked one, not finite.
    """
    try:
        single = _single(value)
        if isinstance(single, np.complexfloating) or not (hasattr(single, "__float__") or hasattr(single, "__index__")):
            raise TypeError("a text, bytes, a complex number")
        found = float(single)
    except Exception as error:  # whatever a foreign type's conversion raises
        raise _refused(name, value, "a number") from error
    if not math.isfinite(found):
        raise _refused(name, value, "a finite number")
    return found


def whole(value: Any, name: str) -> int:
    """An int of 64 bits; numpy's and 0-d arrays too, no truth value and no fraction.

    Raises:
        ConfigError: anything else.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError("a truth value")
        found = operator.index(_single(value))
    except Exception as error:
        raise _refused(name, value, "a whole number") from error
    if not -_WIDEST <= found < _WIDEST:
        raise _refused(name, value, "a whole number of 64 bits")
    return found


def _single(value: Any) -> Any:
    """The one value of an array, anything else as it is; TypeError where it is masked."""
    if np.ma.is_masked(value):
        raise TypeError("a masked value")
    return value.item() if isinstance(value, np.ndarray) else value


def flag(value: Any, name: str) -> bool:
    """A truth value: bool, numpy's, or the numbers 0 and 1.

    Raises:
        ConfigError: anything else.
    """
    try:
        found = _single(value)
        found = found.item() if hasattr(found, "item") else found
        if isinstance(found, bool | int | float) and found in (0, 1):
            return bool(found)
    except Exception as error:
        raise _refused(name, value, "true or false") from error
    raise _refused(name, value, "true or false")


def text(value: Any, name: str, allowed: Sequence[str] = ()) -> str:
    """A text that every store can hold: a str or an enum's, no control of half a character, at most `MAX_TEXT` long.

    Args:
        allowed: the words that it may be; any without.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, enum.Enum) and not isinstance(value, str):
        value = value.value
    if not isinstance(value, str):
        raise _refused(name, value, "a text")
    found = str.__str__(value.value if isinstance(value, enum.Enum) else value)
    if allowed and found not in allowed:
        raise _refused(name, found, "one of " + ", ".join(allowed))
    if len(found) > MAX_TEXT or "\0" in found or not _encodes(found):
        raise _refused(name, found, f"a text of at most {MAX_TEXT} characters that UTF-8 can hold")
    return found


def vector(value: Any, name: str, size: int | None = None) -> npt.NDArray[np.float32]:
    """A float32 array of one dimension from an array, a list or a tensor of numbers; finite.

    Args:
        size: how many entries it has; any number without.

    Raises:
        ConfigError: another shape, no numbers, masked ones, or one that float32 cannot hold.
    """
    try:
        if np.ma.is_masked(value):
            raise TypeError("masked entries")
        array = np.asarray(value)
        if array.dtype.kind not in "fiub" and array.size:
            raise TypeError(f"an array of {array.dtype}")
        with np.errstate(all="ignore"):
            found = np.ascontiguousarray(array, dtype="<f4").reshape(array.shape)
    except Exception as error:
        raise _refused(name, value, "an array of numbers") from error
    if found.ndim != 1 or not found.size or (size is not None and found.size != size):
        wanted = f"({size},)" if size is not None else "(n,), n > 0"
        raise ConfigError(f"{name} has shape {found.shape}, not {wanted}", f"give {name} as one row of numbers")
    if not np.isfinite(found).all():
        at = int(np.argmin(np.isfinite(found)))
        raise ConfigError(
            f"{name}[{at}] is {array[at]!s:.40}, not a finite float32",
            "leave the frame out or discard the attempt; look at the sensor or the policy that gave it",
        )
    return found


def vector_of_scores(value: Any, name: str) -> tuple[float, ...]:
    """Finite numbers of a tuple, list, array or other sequence; may be empty.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        raise _refused(name, value, "a sequence of numbers")
    try:
        scores = [item for _, item in zip(range(_MAX_ITEMS + 1), value, strict=False)]
    except Exception as error:
        raise _refused(name, value, "a sequence of numbers") from error
    if len(scores) > _MAX_ITEMS:
        raise _refused(name, value, f"a sequence of at most {_MAX_ITEMS} numbers")
    return tuple(number(score, f"{name}[{i}]") for i, score in enumerate(scores))


def note(extra: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """`extra` as JSON values, and what was done to it: {key: why} of the keys that were replaced or left out.

    Never raises: numpy values become numbers and lists, tuples and sets lists, dataclasses objects, times and paths
    texts; NaN, an integer beyond 64 bits and an unknown object become a text and are named. More than `MAX_EXTRA`
    bytes are left out, the largest keys first.
    """
    if extra is None:
        return {}, {}
    if not isinstance(extra, Mapping):
        return {"note": _described(extra)}, {"note": f"extra is {type(extra).__name__}, not a mapping"}
    taken: dict[str, Any] = {}
    changed: dict[str, str] = {}
    try:
        items = list(extra.items())
    except Exception as error:
        return {}, {"extra": f"cannot be listed ({type(error).__name__})"}
    for key, value in items:
        name = _key(key)
        taking = _Taking()
        whys = taking.whys
        try:
            plain = _plain(value, taking, 0)
            size = len(json.dumps(plain, allow_nan=False))
        except Exception as error:  # a foreign object may raise anything
            plain, size = _described(value), 0
            whys.append(f"raised {type(error).__name__}")
        if size > MAX_EXTRA:
            changed[name] = f"{size} bytes as JSON, at most {MAX_EXTRA} in all"
            continue
        if name in taken:
            whys.append("two keys become this text")
        taken[name] = plain
        if whys:
            changed[name] = "; ".join(dict.fromkeys(whys))[:_MAX_KEY]
    sizes = {name: len(json.dumps({name: value})) for name, value in taken.items()}
    while sum(sizes.values()) > MAX_EXTRA:
        largest = max(sizes, key=lambda name: sizes[name])
        changed[largest] = f"{sizes.pop(largest)} bytes as JSON, at most {MAX_EXTRA} in all"
        del taken[largest]
    return taken, changed


class _Taking:
    """One entry of a note while it is taken.

    Attributes:
        whys: what was replaced in it. left: values that it may still have.
    """

    def __init__(self) -> None:
        self.whys: list[str] = []
        self.left = _MAX_VALUES


def _plain(value: Any, taking: _Taking, depth: int) -> Any:
    """A JSON value; what was replaced is added to its `whys`."""
    taking.left -= 1  # structures that share their parts can be far larger than they look
    if taking.left < 0:
        return _replaced("…", f"more than {_MAX_VALUES} values", taking)
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if isinstance(value, enum.Enum):
        return _plain(value.value, taking, depth)
    if isinstance(value, str):
        return _plain_text(str.__str__(value), taking)
    if isinstance(value, int | np.integer):
        found = int(value)
        return found if -_WIDEST <= found < _WIDEST else _replaced(_digits(found), "an integer beyond 64 bits", taking)
    if isinstance(value, float | np.floating):
        return (
            float(value) if math.isfinite(float(value)) else _replaced(str(float(value)), "not a finite number", taking)
        )
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, os.PathLike):
        return _plain_text(os.fsdecode(value), taking)
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) > MAX_EXTRA:
            return _replaced(f"<{type(value).__name__} of {len(value)}>", f"more than {MAX_EXTRA} bytes", taking)
        return base64.b64encode(bytes(value)).decode()
    if depth >= _MAX_DEPTH:
        return _replaced("…", f"nested more than {_MAX_DEPTH} deep", taking)
    if isinstance(value, np.ndarray) and (value.dtype.kind not in "fiubU" or value.size > MAX_EXTRA):
        return _replaced(f"<array of {value.dtype}, shape {value.shape}>", "an array that is no note", taking)
    if isinstance(value, np.ndarray) or (hasattr(value, "tolist") and callable(value.tolist)):
        if math.prod(getattr(value, "shape", ())) > MAX_EXTRA:
            return _replaced(f"<{type(value).__name__} of shape {tuple(value.shape)}>", "too large for a note", taking)
        return _plain(value.tolist(), taking, depth + 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _plain(one, taking, depth + 1) for key, one in _bounded(value.items(), taking)}
    if isinstance(value, Set):
        return sorted((_plain(one, taking, depth + 1) for one in _bounded(value, taking)), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(one, taking, depth + 1) for one in _bounded(value, taking)]
    try:  # a 0-d tensor, a decimal, a fraction
        return _plain(float(value), taking, depth)
    except Exception:
        return _replaced(_described(value), f"a {type(value).__name__}, which JSON does not know", taking)


def _bounded(values: Iterable[Any], taking: _Taking) -> list[Any]:
    found = [one for _, one in zip(range(MAX_EXTRA + 1), values, strict=False)]
    if len(found) > MAX_EXTRA:
        taking.whys.append(f"more than {MAX_EXTRA} entries; the others are left out")
    return found[:MAX_EXTRA]


def _plain_text(value: str, taking: _Taking) -> str:
    if _encodes(value):
        return value
    return _replaced(value.encode("utf-8", "backslashreplace").decode(), "a text that UTF-8 cannot hold", taking)


def _replaced(substitute: str, why: str, taking: _Taking) -> str:
    taking.whys.append(why)
    return substitute


def _key(key: Any) -> str:
    key = key.item() if isinstance(key, np.generic) else key
    shown = str.__str__(key) if isinstance(key, str) else _described(key)
    return shown.encode("utf-8", "backslashreplace").decode()[:_MAX_KEY]


def _digits(value: int) -> str:
    return str(value) if value.bit_length() < 1024 else f"<an integer of {value.bit_length()} bits>"


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Short(reprlib.Repr):
    """A text about a structure that is as short as it is quickly made, however often its parts are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_instance(self, x: Any, level: int) -> str:
        return f"<{type(x).__name__}>" if dataclasses.is_dataclass(x) else super().repr_instance(x, level)


_SHORT = _Short()


def _described(value: Any) -> str:
    """A short text about any object, whatever its repr raises."""
    try:
        shown = _SHORT.repr(value) if not isinstance(value, int) or isinstance(value, bool) else _digits(value)
    except Exception:
        shown = f"<{type(value).__name__}>"
    shown = shown.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _refused(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"{name} is {_described(value)} ({type(value).__name__}), not {wanted}", f"give {name} as {wanted}"
    )
