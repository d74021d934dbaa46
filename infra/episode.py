"""An episode and its bytes: the one format from the robot's spool to the learner's shards.

On disk an episode is one sample of a WebDataset tar: members `<id>.meta.json`, `<id>.observations.npy`,
`<id>.actions.npy`, `<id>.rewards.npy`, `<id>.intervention.npy`, `<id>.timestamps.npy`. An episode object holds one
sample; a buffer shard holds many. The tar is deterministic (no clock, no user), so that equal episodes have equal
digests. Tars are streamed, never extracted, and read strictly (`infra.strict`): plain USTAR files only, with caps on
members and bytes, so that reading one takes no more memory than a few times its own size.

A robot's bytes go through `decode`, and what it returns has arrays of their dtypes and ranks and metadata that every
database holds. Whether the values make sense is the data contract's matter. The caps on what a robot may say are here.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from infra.errors import CorruptDataError, named
from infra.strict import MalformedError, read_json, read_npy, read_payload, tar_members

SCHEMA_VERSION = 1
EPISODE_ID = re.compile(r"^[0-9a-f]{32}$")

Source = Literal["demo", "rollout", "play", "online"]
Outcome = Literal["success", "failure", "time_limit"]
SOURCES: tuple[str, ...] = get_args(Source)
OUTCOMES: tuple[str, ...] = get_args(Outcome)

MAX_MEMBER_BYTES = 256 * 2**20  # of one array
MAX_META_BYTES = 256 * 2**10  # of an episode's metadata, `extra` included
MAX_REASONS = 32  # that are kept with an episode; the last says how many were left out
MAX_REASON_CHARS = 500  # of one reason's message

_ARRAYS: dict[str, tuple[str, int]] = {  # dtype and rank
    "observations": ("<f4", 2),
    "actions": ("<f4", 2),
    "rewards": ("<f4", 1),
    "intervention": ("|b1", 1),
    "timestamps": ("<f8", 1),
}
_META = (
    "episode_id", "robot_id", "task", "instruction", "source", "outcome", "policy_version",
    "substep_scores", "started_at", "schema_version", "extra",
)  # fmt: skip
_MEMBERS = ("meta.json", *(f"{name}.npy" for name in _ARRAYS))


def new_episode_id() -> str:
    """A random 128-bit id as 32 lower-case hex digits."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Episode:
    """One finished attempt at one task. T control steps, D observation and A action dimensions.

    Attributes:
        episode_id: 32 lower-case hex digits.
        robot_id: who ran it.
        task: short task key, for example `S1`.
        instruction: the sentence given to the policy.
        source: `demo`, `rollout`, `play` (offline sources) or `online`.
        outcome: `success`, `failure` (stopped early) or `time_limit`.
        policy_version: version of the policy that acted autonomously; None where no policy did.
        observations: (T+1, D) float32; the last row is the state after the last action.
        actions: (T, A) float32, in [-1, 1]: as executed.
        rewards: (T,) float32; 1 on the last step of a success, 0 elsewhere (section III-A).
        intervention: (T,) bool; True where an operator acted.
        timestamps: (T+1,) float64, seconds since the start of the episode, strictly increasing.
        substep_scores: score of each annotated sub-step (1, 0.5 or 0).
        started_at: wall clock at the start, seconds since the epoch.
        extra: JSON values of the embodiment's own, kept but never interpreted.
    """

    episode_id: str
    robot_id: str
    task: str
    instruction: str
    source: Source
    outcome: Outcome
    policy_version: int | None
    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    intervention: npt.NDArray[np.bool_]
    timestamps: npt.NDArray[np.float64]
    substep_scores: tuple[float, ...]
    started_at: float
    extra: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def steps(self) -> int:
        """T, the number of control steps."""
        return int(self.actions.shape[0])

    @property
    def success(self) -> bool:
        return self.outcome == "success"

    @property
    def score(self) -> float:
        """Step-wise score: the mean of the sub-steps' scores."""
        return float(np.mean(self.substep_scores)) if self.substep_scores else float(self.success)

    def meta(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in _META}


def write_samples(episodes: Iterable[Episode], stream: IO[bytes]) -> None:
    """Append the episodes to `stream` as the samples of one deterministic tar."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for episode in episodes:
            if not EPISODE_ID.fullmatch(episode.episode_id):
                raise CorruptDataError(
                    f"episode id {episode.episode_id!r} is not 32 lower-case hex digits",
                    "make ids with infra.episode.new_episode_id()",
                )
            meta = json.dumps(episode.meta(), sort_keys=True, allow_nan=False).encode()
            if len(meta) > MAX_META_BYTES:
                raise CorruptDataError(
                    f"episode {episode.episode_id}: {len(meta)} bytes of metadata, over the cap of {MAX_META_BYTES}",
                    "keep less in `extra`; large data belongs into an array",
                )
            _add(tar, f"{episode.episode_id}.meta.json", meta)
            for name, (dtype, _) in _ARRAYS.items():
                buffer = io.BytesIO()
                np.save(buffer, np.ascontiguousarray(getattr(episode, name), dtype=dtype), allow_pickle=False)
                _add(tar, f"{episode.episode_id}.{name}.npy", buffer.getvalue())


def encode(episode: Episode) -> bytes:
    """The bytes of an episode object: equal episodes give equal bytes."""
    buffer = io.BytesIO()
    write_samples([episode], buffer)
    return buffer.getvalue()


def decode(data: bytes, *, name: str = "episode") -> Episode:
    """Read the one episode of an episode object.

    Raises:
        CorruptDataError: the tar is truncated, holds something else than one episode, or breaks a cap.
    """
    episodes = list(read_samples(io.BytesIO(data), name=name))
    if len(episodes) != 1:
        raise CorruptDataError(f"{name} holds {len(episodes)} episodes, not one", "send it again from the spool")
    return episodes[0]


def read_samples(stream: IO[bytes], *, name: str = "shard") -> Iterator[Episode]:
    """Stream the episodes of a tar, in order.

    Args:
        stream: the tar's bytes.
        name: what to call it in errors.

    Raises:
        CorruptDataError: truncated or damaged tar, a member that is no plain file, unknown or too large, a duplicate or
            missing member, an array of a wrong dtype or rank, metadata that are not of the form.
    """
    fix = "restore the file from its store, or collect it again; it was not used"
    members: dict[str, bytes] = {}
    current: str | None = None
    try:
        for member, size in tar_members(stream, MAX_MEMBER_BYTES):
            key, _, suffix = member.partition(".")
            if not EPISODE_ID.fullmatch(key):
                raise MalformedError(f"member {named(member)} does not begin with an episode id")
            if key != current:
                if current is not None:
                    yield _assemble(current, members, name)
                current, members = key, {}
            if suffix in members:
                raise MalformedError(f"member {member!r} is repeated")
            if suffix not in _MEMBERS:
                raise MalformedError(f"member {named(member)} is none of an episode's: {', '.join(_MEMBERS)}")
            if suffix == "meta.json" and size > MAX_META_BYTES:
                raise MalformedError(f"{member!r} has {size} bytes, over the cap of {MAX_META_BYTES}")
            members[suffix] = read_payload(stream, member, size)
    except MalformedError as error:
        raise CorruptDataError(f"{name}: {error}", fix) from error
    if current is not None:
        yield _assemble(current, members, name)


def _add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, no owner: the digest depends on the content alone
    info.size = len(payload)
    tar.addfile(info, io.BytesIO(payload))


def _assemble(key: str, members: dict[str, bytes], name: str) -> Episode:
    fix = "collect the episode again; the robot's client must be of schema version " + str(SCHEMA_VERSION)
    if missing := [member for member in _MEMBERS if member not in members]:
        raise CorruptDataError(f"{name}: episode {key} lacks {', '.join(missing)}", fix)
    fields = _meta(key, members.pop("meta.json"), name, fix)
    arrays: dict[str, Any] = {}
    for array, (dtype, rank) in _ARRAYS.items():
        try:
            found = read_npy(members.pop(f"{array}.npy"))  # popped: its bytes need not be kept beside the array
        except (MalformedError, MemoryError) as error:
            raise CorruptDataError(f"{name}: episode {key}: {array} cannot be read ({error})", fix) from error
        if found.dtype != np.dtype(dtype):
            raise CorruptDataError(f"{name}: episode {key}: {array} is {found.dtype}, not {dtype}", fix)
        if found.ndim != rank:
            raise CorruptDataError(f"{name}: episode {key}: {array} has {found.ndim} dimensions, not {rank}", fix)
        arrays[array] = found
    return Episode(**fields, **arrays)


def _meta(key: str, payload: bytes, name: str, fix: str) -> dict[str, Any]:
    """The metadata's fields; the types of most are the contract's matter."""
    try:
        fields = read_json(payload)
    except (MalformedError, MemoryError) as error:
        raise CorruptDataError(f"{name}: episode {key}: its metadata cannot be read ({error})", fix) from error
    if wrong := fields.keys() ^ set(_META):
        word = "lacks" if (first := min(wrong)) in _META else "has the unknown field"
        raise CorruptDataError(f"{name}: episode {key} cannot be read: its metadata {word} {named(first)}", fix)
    if fields["episode_id"] != key:
        raise CorruptDataError(f"{name}: episode {key} calls itself {named(fields['episode_id'])}", fix)
    if not isinstance(fields["extra"], dict):
        raise CorruptDataError(f"{name}: episode {key}: extra is {named(fields['extra'])}, not an object", fix)
    if not isinstance(fields["substep_scores"], list):
        found = named(fields["substep_scores"])
        raise CorruptDataError(f"{name}: episode {key}: substep_scores is {found}, not a list", fix)
    return fields | {"substep_scores": tuple(fields["substep_scores"])}
