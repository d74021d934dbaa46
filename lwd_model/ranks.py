"""Ranks that learn together: the same version of the data, the same batch, the same gradient (invariant I5).

Each rank is a process with a reader of its own. Before a step the ranks tell each other, over a side Gloo group, which
versions each could hold next and by what digest; they settle on the newest that all of them can hold, so that a slow
rank holds the others back and none trains on other data. The batch is drawn alike by all and cut by rank
(`chunks.mixed_sample`), and gradients are averaged: any number of ranks does the arithmetic of one.

A rank that dies or does not answer within T makes every other raise an UnavailableError that names it. The group is
then of no more use: all ranks start again, from the checkpoint, and come to the checkpoint's version first. One rank
alone needs no group and pays nothing.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import ConfigError, CorruptDataError, UnavailableError

MOST_OFFERS = 16
_DIGEST_BYTES = 32
_ENTRY = 8 + _DIGEST_BYTES
_PAUSE_S, _GRACE_S = 0.02, 2.0
_RESTART = "start all ranks again; they go on from the last checkpoint, at its version"

Offer = tuple[int, str]  # a version that a rank could hold now, and its digest (64 hex digits)


class Ranks:
    """This process's place among the ranks, and what they do together. Every rank must make the same calls in order.

    Args:
        rank, world: this one, of how many.
        store: `torch.distributed` store that all ranks reach; not needed by one alone. Best kept by a process that is
            no rank (torchrun's agent): its death is then told from a rank's.
        timeout_s: T, longer than any pause of a healthy rank between two steps.

    Raises:
        ConfigError: the numbers do not fit, or the store is missing.
        UnavailableError: a rank did not come within T; the message names it.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, store: dist.Store | None = None, *, timeout_s: float = 120.0
    ) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world}", "ranks are numbered from 0 to world - 1")
        if world > 1 and store is None:
            raise ConfigError(f"{world} ranks without a store to meet at", "start them with torchrun")
        self.rank, self.world, self.timeout_s = rank, world, timeout_s
        self._store = store
        self._group: Any = None  # ProcessGroupGloo; torch's stubs lack its collectives
        if store is not None and world > 1:
            if late := self._absent("here", "1", time.monotonic() + timeout_s):
                raise self._unavailable(late)
            self._group = dist.ProcessGroupGloo(
                dist.PrefixStore("gloo", store), rank, world, timedelta(seconds=timeout_s)
            )

    @classmethod
    def from_environment(cls, timeout_s: float = 120.0, environment: Mapping[str, str] = os.environ) -> Ranks:
        """As torchrun says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); one rank alone where it says nothing."""
        rank, world = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        try:
            host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        except KeyError as error:
            raise ConfigError(f"WORLD_SIZE={world} without {error.args[0]}", "start the ranks with torchrun") from error
        keeps = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = dist.TCPStore(
                host, port, world, is_master=keeps, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
            )
        except RuntimeError as error:
            raise UnavailableError(f"the ranks' store at {host}:{port}: {error}", "see that rank 0 runs") from error
        life = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(rank, world, dist.PrefixStore(f"lwd/{life}", store), timeout_s=timeout_s)

    def part(self, count: int) -> slice:
        """This rank's share of `count` samples, contiguous; the ranks' shares together are all of them, in order.

        Raises:
            ConfigError: the samples cannot be shared equally.
        """
        if count % self.world:
            raise ConfigError(
                f"{count} samples cannot be shared equally by {self.world} ranks",
                "choose a batch and a policy_batch that are multiples of the number of ranks",
            )
        share = count // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    def exchange(self, message: Tensor) -> list[Tensor]:
        """Every rank's message by rank; CPU tensors of one shape and type.

        Raises:
            UnavailableError: a rank did not answer within T; the message names it.
        """
        if self._group is None:
            return [message]
        answers = [torch.empty_like(message) for _ in range(self.world)]
        self._together(lambda group: group.allgather([answers], [message]))
        return answers

    def average(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its mean over the ranks, the same bits on each; returns it. Raises as `exchange`."""
        if self._group is not None:
            self._together(lambda group: group.allreduce([tensor]))
            tensor.div_(self.world)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; the same answer on each. Raises as `exchange`."""
        return any(bool(answer) for answer in self.exchange(torch.tensor([flag])))

    def close(self) -> None:
        """Leave the group."""
        self._group = None

    def _together(self, call: Callable[[Any], dist.Work]) -> None:
        began = time.monotonic()
        try:
            call(self._group).wait()
        except RuntimeError as error:
            waited = time.monotonic() - began
            self._group = None  # closes the connections, so that every other rank fails now and not at its own T
            raise self._who(began + self.timeout_s, waited, error) from error

    def _who(self, deadline: float, waited: float, error: RuntimeError) -> UnavailableError:
        """A roll call after a failure: the rank that does not answer is the one that is gone."""
        deadline = max(deadline, time.monotonic() + _GRACE_S)
        if absent := self._absent("waited", repr(waited), deadline):
            return self._unavailable(absent)
        assert self._store is not None
        times = [float(self._store.get(f"waited/{rank}")) for rank in range(self.world)]
        if late := [rank for rank, seconds in enumerate(times) if seconds < max(times) / 2]:
            return self._unavailable(late)
        return UnavailableError(f"the ranks lost contact, though each still runs: {error}", _RESTART)

    def _absent(self, roll: str, answer: str, deadline: float) -> list[int]:
        """Answer a roll call and wait for the others; those that have not answered by the deadline."""
        assert self._store is not None
        try:
            self._store.set(f"{roll}/{self.rank}", answer)
            absent = [rank for rank in range(self.world) if rank != self.rank]
            while absent := [rank for rank in absent if not self._store.check([f"{roll}/{rank}"])]:
                if time.monotonic() >= deadline:
                    break
                time.sleep(_PAUSE_S)
        except RuntimeError as error:
            raise UnavailableError(
                f"the ranks' store is gone, and with it rank 0 or torchrun's agent, whichever kept it: {error}",
                _RESTART,
            ) from error
        return absent

    def _unavailable(self, absent: Sequence[int]) -> UnavailableError:
        names = ", ".join(f"rank {rank}" for rank in absent)
        return UnavailableError(
            f"{names} of {self.world} did not answer rank {self.rank} within {self.timeout_s:g} s",
            f"read the log of {names}, then {_RESTART}",
        )


@dataclass(frozen=True)
class Agreed:
    """What all ranks hold next.

    Attributes:
        version, digest: of the snapshot.
        newest: the newest version that any rank could hold.
    """

    version: int
    digest: str
    newest: int

    @property
    def staleness(self) -> int:
        """How many versions the agreement is behind the fastest rank."""
        return self.newest - self.version


class RankAgreement:
    """Settles, before a step, on one (version, digest) for all ranks.

    Args:
        ranks: who takes part.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def settle(self, offers: Sequence[Offer]) -> Agreed:
        """The newest version that every rank offers.

        Args:
            offers: versions that this rank could hold now, ascending: the one that it holds, and those after it that it
                has read whole. Of more than 16 the oldest but the first are not offered.

        Raises:
            CorruptDataError: two ranks have different digests of one version; both are named.
            ConfigError: the ranks hold different versions already.
            UnavailableError: see `Ranks.exchange`.
        """
        if self.ranks.world == 1:
            return Agreed(*offers[-1], offers[-1][0])
        if len(offers) > MOST_OFFERS:
            offers = [offers[0], *offers[1 - MOST_OFFERS :]]
        answers = [_unpacked(answer) for answer in self.ranks.exchange(_packed(offers))]
        common = dict(answers[0])
        first = {version: (0, digest) for version, digest in answers[0]}
        for rank, answer in enumerate(answers[1:], 1):
            for version, digest in answer:
                other, expected = first.setdefault(version, (rank, digest))
                if digest != expected:
                    raise CorruptDataError(
                        f"snapshot {version} is {expected} on rank {other} and {digest} on rank {rank}",
                        "point all ranks at one catalog; `lwd data verify` says whether its rows were changed",
                    )
            common = {version: digest for version, digest in answer if version in common}
        newest = max(answer[-1][0] for answer in answers)
        if not common:
            held = ", ".join(f"rank {rank} {answer[0][0]}" for rank, answer in enumerate(answers))
            raise ConfigError(
                f"the ranks did not begin at one version ({held})", "start all ranks from the same checkpoint"
            )
        version = max(common)
        return Agreed(version, common[version], newest)


class Step(Protocol):
    """What leads from one version to the next; `infra.reader.Increment` is one."""

    @property
    def version(self) -> int: ...
    @property
    def digest(self) -> str: ...


S = TypeVar("S", bound=Step)


class AgreedReader(Generic[S]):
    """A reader whose increments are handed on only as far as all ranks have them.

    Args:
        poll: the reader's next increment, or None; never waits (`SnapshotReader.poll`).
        ranks: who must agree.
        version, digest: held already, the same on all ranks.
        ahead: increments that are kept while others catch up; they are in memory.

    Attributes:
        version, digest: held by all ranks.
        staleness: versions between what the fastest rank has read and what all hold.
    """

    def __init__(
        self, poll: Callable[[], S | None], ranks: Ranks, *, version: int, digest: str, ahead: int = 8
    ) -> None:
        self.version, self.digest, self.staleness = version, digest, 0
        self._poll = poll
        self._agreement = RankAgreement(ranks)
        self._ahead = ahead
        self._waiting: deque[S] = deque()
        self._newest = version  # that any rank has told of

    def advance(self, limit: int | None = None) -> list[S]:
        """One agreement: what all ranks apply now, in order, often nothing. Every rank must call it at the same step.

        Args:
            limit: read no further than needed to hold this version: a restarted learner comes to its checkpoint's
                version by `while reader.version < limit: reader.advance(limit)`, and all its ranks with it.

        Raises:
            CorruptDataError, UnavailableError: see `RankAgreement.settle`.
        """
        while self._wants_more(limit) and (step := self._poll()) is not None:
            self._waiting.append(step)
        offers = [(self.version, self.digest), *((step.version, step.digest) for step in self._waiting)]
        agreed = self._agreement.settle(offers)
        self._newest, self.staleness = agreed.newest, agreed.staleness
        taken = []
        while self._waiting and self._waiting[0].version <= agreed.version:
            taken.append(self._waiting.popleft())
        self.version, self.digest = agreed.version, agreed.digest
        return taken

    def _wants_more(self, limit: int | None) -> bool:
        read = self._waiting[-1].version if self._waiting else self.version
        if read < self._newest:  # another rank is there, and may not be able to hold anything before
            return True
        return len(self._waiting) < self._ahead and (limit is None or read < limit)


def _packed(offers: Sequence[Offer]) -> Tensor:
    data = bytearray(len(offers).to_bytes(8, "big"))
    for version, digest in offers:
        raw = bytes.fromhex(digest)
        if len(raw) != _DIGEST_BYTES:
            raise ConfigError(f"{digest!r} is no sha256 in hex", "offer the snapshot's digest")
        data += version.to_bytes(8, "big") + raw
    return torch.frombuffer(data.ljust(8 + MOST_OFFERS * _ENTRY, b"\0"), dtype=torch.uint8)


def _unpacked(message: Tensor) -> list[Offer]:
    data = message.numpy().tobytes()
    places = range(8, 8 + int.from_bytes(data[:8], "big") * _ENTRY, _ENTRY)
    return [(int.from_bytes(data[i : i + 8], "big"), data[i + 8 : i + _ENTRY].hex()) for i in places]
