"""The log of one episode while it is being recorded: length- and CRC-framed records, appended frame by frame.

A log is one begin record, any number of frames, one close record. A torn or damaged record, or a missing close
record, is detected when the log is read back.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.episode import Episode, Outcome, Source
from infra.errors import ConfigError, CorruptDataError

_HEAD = struct.Struct("<IIc")  # payload bytes, crc32 of kind and payload, kind
_STEP = struct.Struct("<Idf?")  # observation entries, timestamp, reward, intervention
_BEGIN, _FRAME, _CLOSE = b"B", b"F", b"C"
_MAX_RECORD = 16 * 2**20
_FIX = "nothing to do: this attempt is discarded, earlier episodes are intact"


@dataclass(frozen=True)
class EpisodeStart:
    """What is known when an episode begins; fields as in infra.episode.Episode."""

    episode_id: str
    robot_id: str
    task: str
    instruction: str
    source: Source
    policy_version: int | None
    started_at: float


@dataclass(frozen=True)
class Frame:
    """One control step: `observation` (D,) float32 seen at `timestamp` seconds since the episode's start, and the
    `action` (A,) float32 executed from it with its `reward`; `intervention` is True where an operator acted."""

    observation: npt.NDArray[np.float32]
    action: npt.NDArray[np.float32]
    reward: float
    intervention: bool
    timestamp: float


@dataclass(frozen=True)
class EpisodeEnd:
    """How an episode ended: the state after the last action, (D,) float32, its time, outcome and scores."""

    observation: npt.NDArray[np.float32]
    timestamp: float
    outcome: Outcome
    substep_scores: tuple[float, ...]
    extra: dict[str, Any] = field(default_factory=dict)


def begin_record(start: EpisodeStart) -> bytes:
    """The first record of a log."""
    return _record(_BEGIN, json.dumps(asdict(start), allow_nan=False).encode())


def frame_record(frame: Frame) -> bytes:
    """One control step as a record.

    Raises:
        ConfigError: it is larger than a record may be, 16 MiB.
    """
    observation = np.ascontiguousarray(frame.observation, dtype="<f4")
    action = np.ascontiguousarray(frame.action, dtype="<f4")
    step = _STEP.pack(observation.size, frame.timestamp, frame.reward, frame.intervention)
    return _record(_FRAME, step + observation.tobytes() + action.tobytes())


def close_record(end: EpisodeEnd) -> bytes:
    """The last record of a log."""
    document = {
        "observation": np.asarray(end.observation, dtype="<f4").tobytes().hex(),
        "timestamp": end.timestamp,
        "outcome": end.outcome,
        "substep_scores": list(end.substep_scores),
        "extra": end.extra,
    }
    return _record(_CLOSE, json.dumps(document, allow_nan=False).encode())


def read_log(log: Path) -> Episode:
    """The episode of a log that was closed.

    Raises:
        CorruptDataError: a record is torn or damaged, or there is no close record: the robot died in the middle.
    """
    records = list(_records(log))
    if not records or records[0][0] != _BEGIN:
        raise CorruptDataError(f"{log.name} has no beginning", _FIX)
    if records[-1][0] != _CLOSE:
        raise CorruptDataError(f"{log.name} was never closed: {len(records) - 1} whole frames, no outcome", _FIX)
    if len(records) == 2:
        raise CorruptDataError(f"{log.name} was closed without a single frame", _FIX)
    try:
        return _assemble(
            json.loads(records[0][1]), [payload for _, payload in records[1:-1]], json.loads(records[-1][1])
        )
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise CorruptDataError(f"{log.name}: its frames do not make an episode ({error})", _FIX) from error


def _assemble(start: dict[str, Any], frames: list[bytes], end: dict[str, Any]) -> Episode:
    observations, actions, steps = [], [], []
    for payload in frames:
        dims, *step = _STEP.unpack_from(payload)
        steps.append(step)
        values = np.frombuffer(payload, dtype="<f4", offset=_STEP.size)
        observations.append(values[:dims])
        actions.append(values[dims:])
    observations.append(np.frombuffer(bytes.fromhex(end["observation"]), dtype="<f4"))
    return Episode(
        **start,
        outcome=end["outcome"],
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.array([reward for _, reward, _ in steps], dtype=np.float32),
        intervention=np.array([taken for _, _, taken in steps], dtype=np.bool_),
        timestamps=np.array([*(at for at, _, _ in steps), end["timestamp"]], dtype=np.float64),
        substep_scores=tuple(end["substep_scores"]),
        extra=end["extra"],
    )


def _records(log: Path) -> Iterator[tuple[bytes, bytes]]:
    data = log.read_bytes()
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise CorruptDataError(f"{log.name}: torn record at byte {at}", _FIX)
        size, crc, kind = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + size]
        if size > _MAX_RECORD or len(payload) != size or zlib.crc32(kind + payload) != crc:
            raise CorruptDataError(f"{log.name}: torn record at byte {at}", _FIX)
        yield kind, payload
        at += _HEAD.size + size


def _record(kind: bytes, payload: bytes) -> bytes:
    if len(payload) > _MAX_RECORD:
        raise ConfigError(
            f"a record of {len(payload) / 2**20:.1f} MiB, more than the {_MAX_RECORD // 2**20} MiB that a log bears",
            "record smaller observations, or a smaller `extra`",
        )
    return _HEAD.pack(len(payload), zlib.crc32(kind + payload), kind) + payload
