"""Bytes that no honest robot writes, member by member: for the tests of everything that reads an episode."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from infra.episode import Episode, encode

Members = list[tuple[bytes, bytes]]  # header of 512 bytes, payload


def header(name: str, size: int, *, kind: bytes = b"0", **fields: Any) -> bytes:
    """A USTAR header with any type flag and any raw fields at their offsets: `at_124=b"..."`."""
    info = tarfile.TarInfo(name)
    info.size = size
    return patched(info.tobuf(tarfile.USTAR_FORMAT), {156: kind, **{int(k[3:]): v for k, v in fields.items()}})


def patched(block: bytes, changes: dict[int, bytes]) -> bytes:
    """The header with bytes replaced at offsets, and its checksum right."""
    raw = bytearray(block)
    for at, value in changes.items():
        raw[at : at + len(value)] = value
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def tar(members: Iterable[tuple[bytes, bytes]], end: bytes = bytes(1024)) -> bytes:
    return b"".join(head + payload + bytes(-len(payload) % 512) for head, payload in members) + end


_parts: dict[str, dict[str, bytes]] = {}  # by id: thousands of cases change one episode


def parts(episode: Episode) -> dict[str, bytes]:
    """The payload of each member of the episode's object, by suffix."""
    if episode.episode_id not in _parts:
        _parts[episode.episode_id] = _read(encode(episode))
    return _parts[episode.episode_id]


def _read(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {info.name.partition(".")[2]: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def packed(episode_id: str, payloads: dict[str, bytes]) -> bytes:
    """An episode's object of any payloads."""
    return tar((header(f"{episode_id}.{suffix}", len(data)), data) for suffix, data in payloads.items())


def with_array(episode: Episode, name: str, array: np.ndarray[Any, Any]) -> bytes:
    """The object with one array replaced by whatever `numpy.save` makes of another."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return packed(episode.episode_id, parts(episode) | {f"{name}.npy": buffer.getvalue()})


def with_meta(episode: Episode, **fields: Any) -> bytes:
    """The object with metadata of any JSON values; surrogates and NaN are written as Python's json writes them."""
    meta = json.loads(parts(episode)["meta.json"]) | fields
    return with_raw_meta(episode, json.dumps(meta).encode())


def with_raw_meta(episode: Episode, meta: bytes) -> bytes:
    return packed(episode.episode_id, parts(episode) | {"meta.json": meta})


def npy(text: bytes, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An npy file of any header."""
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + text + payload
