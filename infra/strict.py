"""Readers of bytes that somebody else made: USTAR, npy and JSON, each in the one form that LWD writes.

A general reader accepts what nobody here needs, and each such thing has been an attack: extension headers of a tar
(CVE-2024-6232: quadratic time in Python's reader before 3.11.10), literals in the header of an npy file, duplicate keys
and numbers without end in JSON. What is not of the form is refused before it is parsed. Time and memory are linear in
the bytes read.
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from infra.errors import named, shown

MAX_META_DEPTH = 32  # of lists and objects within each other
_BLOCK = tarfile.BLOCKSIZE
_MAGIC = tarfile.POSIX_MAGIC  # b"ustar\\0" and version "00"
_OCTAL = re.compile(rb"[0-7]{11}\0")
_NPY = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z][0-9]{0,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,12}(?:, ?|(?=\))))*)\), ?\} *\n"
)
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_NPY_HEADER = 1024
_LONE_OR_NUL = re.compile("[\x00\ud800-\udfff]")


class MalformedError(ValueError):
    """The bytes are not of the form; the text says what was found."""


def tar_members(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[str, int]]:
    """Name and size of each member of a USTAR archive; its payload is to be read from `stream` before the next is asked
    for: `read_payload`.

    Args:
        stream: the archive's bytes, at its beginning.
        max_bytes: the largest member.

    Raises:
        MalformedError: anything but plain files in USTAR headers, two blocks of zeros, and zeros up to a full record.
    """
    while True:
        header = stream.read(_BLOCK)
        if len(header) < _BLOCK:
            raise MalformedError("not a readable tar (unexpected end)")
        if not any(header):
            break
        name, size = _member(header)
        if size > max_bytes:
            raise MalformedError(f"{name!r} has {size} bytes, over the cap of {max_bytes}")
        yield name, size
    rest = stream.read(_BLOCK + tarfile.RECORDSIZE)
    if len(rest) < _BLOCK or len(rest) > tarfile.RECORDSIZE or any(rest):
        raise MalformedError("not a readable tar (its end is not a record of zeros)")


def _member(header: bytes) -> tuple[str, int]:
    """Name and size that a header gives; whatever asks for a reader of extensions is refused by its type alone."""
    kind = header[156:157]
    label = shown(header[:100].rstrip(b"\0").decode("ascii", "backslashreplace"), 120)
    try:
        plain = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    except (tarfile.HeaderError, ValueError) as error:  # a checksum, a number
        raise MalformedError(f"not a readable tar ({shown(str(error))})") from error
    if kind != tarfile.REGTYPE or header[257:265] != _MAGIC or plain.linkname:
        raise MalformedError(f"{label!r} is not a plain file in a USTAR header")
    if not _OCTAL.fullmatch(header[124:136]):
        raise MalformedError(f"the size of {label!r} is not eleven octal digits")
    return plain.name, plain.size


def read_payload(stream: IO[bytes], name: str, size: int) -> bytes:
    """The member's bytes; MalformedError if the stream ends before, or the padding is not zeros."""
    payload = stream.read(size)
    padding = stream.read(-size % _BLOCK)
    if len(payload) != size or len(padding) != -size % _BLOCK:
        raise MalformedError(f"{name!r} is truncated")
    if any(padding):
        raise MalformedError(f"{name!r} is followed by bytes that are not zeros")
    return payload


def read_npy(payload: bytes) -> npt.NDArray[Any]:
    """The array of an npy file of version 1.0 as `numpy.save` writes it for numbers; in C order, with its own memory.

    Raises:
        MalformedError: another version, a header of other words, a dtype that is none, fewer or more bytes than the
            shape has, or a truth value of another byte than 0 and 1, which libraries take for different things.
    """
    if payload[:8] != _NPY_MAGIC or len(payload) < 10:
        raise MalformedError("not an npy file of version 1.0")
    end = 10 + int.from_bytes(payload[8:10], "little")
    header = _NPY.fullmatch(payload, 10, end) if end <= _MAX_NPY_HEADER else None
    if header is None:
        raise MalformedError("the npy header is not one that numpy.save writes for numbers")
    try:
        dtype = np.dtype(header[1].decode())
    except TypeError as error:
        raise MalformedError(f"no dtype {header[1].decode()!r}") from error
    if dtype.hasobject or dtype.itemsize == 0:
        raise MalformedError(f"dtype {dtype} is not a number")
    shape = tuple(int(size) for size in header[3].decode().replace(",", " ").split())
    if max(shape, default=0) > len(payload):  # of no bytes, and with rows for whoever goes through them for ever
        raise MalformedError(f"{len(payload) - end} bytes are no array of shape {shape}")
    if math.prod(shape) * dtype.itemsize != len(payload) - end:
        raise MalformedError(f"{len(payload) - end} bytes are not {dtype} of shape {shape}")
    try:
        flat = np.frombuffer(payload, dtype, offset=end)
        array = flat.reshape(shape[::-1]).T if header[2] == b"True" else flat.reshape(shape)
    except (ValueError, OverflowError) as error:  # more dimensions than numpy has, or sizes beyond its integers
        raise MalformedError(f"shape {shape}: {error}") from error
    if dtype.kind == "b" and (flat.view(np.uint8) > 1).any():
        raise MalformedError("a truth value is neither 0 nor 1")
    return np.array(array, order="C")


def read_json(payload: bytes) -> dict[str, Any]:
    """The JSON object, of values that every database and every reader can hold.

    Raises:
        MalformedError: not JSON, no object, a key twice, a number beyond 64 bits or not finite, a NUL character or half
            of a surrogate pair, or more than 32 levels.
    """
    try:
        value = json.loads(
            payload.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
        )
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise MalformedError(f"a JSON {type(value).__name__}, not an object")
    _check_values(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedError(f"key {named(twice)} is there twice")
    return found


def _no_number(constant: str) -> NoReturn:
    raise MalformedError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise MalformedError(f"number {shown(digits, 40)} is beyond a double")
    return value


def _check_values(value: Any) -> None:
    """Iterative: a structure that is too deep must not be an error of this reader's own."""
    level, depth = [value], 0
    while level:
        if depth > MAX_META_DEPTH:
            raise MalformedError(f"more than {MAX_META_DEPTH} levels")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str):
                if _LONE_OR_NUL.search(one):
                    raise MalformedError(f"text {named(one)} holds a NUL character or half of a surrogate pair")
            elif type(one) is int and not -(2**63) <= one < 2**63:
                raise MalformedError("a whole number is beyond 64 bits")
        level, depth = below, depth + 1
