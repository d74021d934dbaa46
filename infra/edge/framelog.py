"""The log of one episode while it is being recorded: length- and CRC-framed records, appended frame by frame.

A log is one begin record, any number of frames, one close record. A torn or damaged record, or a missing close
record, is detected when the log is read back.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.edge import values
from infra.episode import OUTCOMES, SOURCES, Episode, Outcome, Source
from infra.errors import ConfigError, CorruptDataError

_HEAD = struct.Struct("<IIc")  # payload bytes, crc32 of kind and payload, kind
_STEP = struct.Struct("<Idf?")  # observation entries, timestamp, reward, intervention
_BEGIN, _FRAME, _CLOSE = b"B", b"F", b"C"
_MAX_RECORD = 16 * 2**20
_LARGEST = float(np.finfo(np.float32).max)
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
    """The first record of a log.

    Raises:
        ConfigError: a field is not of its type.
    """
    version = start.policy_version
    document = {
        "episode_id": values.text(start.episode_id, "episode_id"),
        "robot_id": values.text(start.robot_id, "robot_id"),
        "task": values.text(start.task, "task"),
        "instruction": values.text(start.instruction, "instruction"),
        "source": values.text(start.source, "source", SOURCES),
        "policy_version": None if version is None else values.whole(version, "policy_version"),
        "started_at": values.number(start.started_at, "started_at"),
    }
    return _record(_BEGIN, json.dumps(document, allow_nan=False).encode())


def frame_record(frame: Frame) -> bytes:
    """One control step as a record.

    Raises:
        ConfigError: a field is not of its type, or the record is larger than one may be, 16 MiB.
    """
    try:
        given = (frame.observation, frame.action, frame.reward, frame.intervention, frame.timestamp)
    except AttributeError as error:
        raise ConfigError(
            f"a frame is of type {type(frame).__name__}, which has no {error.name}", "give an infra.edge.framelog.Frame"
        ) from error
    observation, action = values.vector(given[0], "observation"), values.vector(given[1], "action")
    reward = values.number(given[2], "reward")
    if abs(reward) > _LARGEST:
        raise ConfigError(f"reward is {reward:g}, more than a float32 can hold", "give reward as 0 or 1")
    timestamp = values.number(given[4], "timestamp")
    step = _STEP.pack(observation.size, timestamp, reward, values.flag(given[3], "intervention"))
    return _record(_FRAME, step + observation.tobytes() + action.tobytes())


def frame_dims(record: bytes) -> tuple[int, int]:
    """D and A of a frame's record."""
    dims = int(_STEP.unpack_from(record, _HEAD.size)[0])
    return dims, (len(record) - _HEAD.size - _STEP.size) // 4 - dims


def close_record(end: EpisodeEnd, obs_dim: int | None = None) -> bytes:
    """The last record of a log.

    Args:
        end: its `extra` holds JSON values only, as `values.note` makes them.
        obs_dim: D of the episode's frames.

    Raises:
        ConfigError: a field other than `extra` is not of its type or size.
    """
    document = {
        "observation": values.vector(end.observation, "observation", obs_dim).tobytes().hex(),
        "timestamp": values.number(end.timestamp, "timestamp"),
        "outcome": values.text(end.outcome, "outcome", OUTCOMES),
        "substep_scores": values.vector_of_scores(end.substep_scores, "substep_scores"),
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
        row = np.frombuffer(payload, dtype="<f4", offset=_STEP.size)
        observations.append(row[:dims])
        actions.append(row[dims:])
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
