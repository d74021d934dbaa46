"""Ranks agree on their data, say who is missing, and together make the update that one alone would make."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, CorruptDataError, UnavailableError
from lwd_model.chunks import Batch, mixed_sample
from lwd_model.learner import Learner
from lwd_model.ranks import MOST_OFFERS, Agreed, AgreedReader, RankAgreement, Ranks
from tests.lwd_model.factory import agent_config, normaliser, replay
from tests.lwd_model.rank_processes import ranks_store, result, started, together

T = 2.0


def digest(version: int, content: str = "") -> str:
    return hashlib.sha256(f"{version}{content}".encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """An increment without its episodes."""

    after: int
    version: int

    @property
    def digest(self) -> str:
        return digest(self.version)


# --- agreement --------------------------------------------------------------------------------------------------------


Offers = list[list[tuple[int, str]]]  # by rank


def settle(ranks: Ranks, cases: list[Offers]) -> list[Any]:
    """What this rank is told in each case."""
    told: list[Any] = []
    for offers in cases:
        try:
            told.append(RankAgreement(ranks).settle(offers[ranks.rank]))
        except (CorruptDataError, ConfigError) as error:
            told.append(error)
    return told


def offered(*versions: int) -> list[tuple[int, str]]:
    return [(version, digest(version)) for version in versions]


def test_one_rank_alone_needs_no_group() -> None:
    ranks = Ranks()
    assert RankAgreement(ranks).settle(offered(3, 4, 5)) == Agreed(5, digest(5), 5)
    tensor = torch.ones(3)
    assert ranks.average(tensor) is tensor and ranks.exchange(tensor) == [tensor]
    assert Ranks.from_environment(environment={}).world == 1
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        Ranks(2, 2)
    with pytest.raises(ConfigError, match="without a store"):
        Ranks(1, 2)
    with pytest.raises(ConfigError, match="without MASTER_ADDR"):
        Ranks.from_environment(environment={"WORLD_SIZE": "2"})


CASES = [
    ([[0, 1, 2], [0, 1], [0, 1]], (1, 2)),
    ([[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]], (2, 3)),
    ([[0, 1, 2], [0, 2], [0, 1, 2]], (2, 2)),  # rank 1 read over a version whose object was withdrawn since
    ([[0, 1], [0, 2], [0, 1]], (0, 2)),
    ([[7], [7], [7]], (7, 7)),
    ([list(range(50)), [0, 1, 45], [0, 45]], (45, 49)),  # of more than fit, the newest are offered
]


def test_ranks_settle_on_the_newest_version_that_all_can_hold() -> None:
    assert 50 - MOST_OFFERS < 45
    found = together(settle, 3, [[offered(*versions) for versions in offers] for offers, _ in CASES])
    assert found[0] == found[1] == found[2]
    for agreed, (_, (version, newest)) in zip(found[0], CASES, strict=True):
        assert agreed == Agreed(version, digest(version), newest)
        assert agreed.staleness == newest - version


def test_another_digest_of_the_same_version_is_named_on_every_rank() -> None:
    """I5."""
    tampered = [(0, digest(0)), (1, digest(1, "tampered"))]
    for corrupt, apart in together(settle, 2, [[offered(0, 1), tampered], [offered(1), offered(2)]]):
        assert isinstance(corrupt, CorruptDataError)
        assert f"snapshot 1 is {digest(1)} on rank 0 and {tampered[1][1]} on rank 1" in corrupt.problem
        assert isinstance(apart, ConfigError) and "rank 0 1, rank 1 2" in apart.problem


def random_chain(rng: random.Random, last: int) -> list[Step]:
    """A way from 0 to `last` that sometimes reaches over versions, as a reader's does after withdrawals."""
    chain, version = [], 0
    while version < last:
        target = min(last, version + (rng.randint(2, 6) if rng.random() < 0.2 else 1))
        chain.append(Step(version, target))
        version = target
    return chain


def read_scenarios(ranks: Ranks, seeds: range, last: int, slow: float) -> list[list[tuple[int, int]]]:
    """(version after it, staleness) of each step, by scenario; this rank's data come at random."""
    told = []
    for seed in seeds:
        own = random.Random(f"{seed} {ranks.rank}")
        chain = iter(random_chain(own, last))
        share = slow if ranks.rank == seed % ranks.world else 0.9

        def poll(chain: Any = chain, own: random.Random = own, share: float = share) -> Step | None:
            return next(chain, None) if own.random() < share else None

        reader = AgreedReader(poll, ranks, version=0, digest=digest(0))
        steps, taken = [], 0
        while reader.version < last:
            for step in reader.advance():
                assert step.after == taken, "not in order"
                taken = step.version
            assert taken == reader.version and reader.digest == digest(taken)
            steps.append((reader.version, reader.staleness))
        told.append(steps)
    return told


@pytest.mark.parametrize("world", [2, 4])
def test_row_28_a_slow_rank_holds_the_others_at_its_version(world: int) -> None:
    """Whatever comes when, and whichever way a rank reads, every rank holds the same version at every step."""
    found = together(read_scenarios, world, range(4), 25, 0.1)
    assert all(ranks == found[0] for ranks in found[1:])
    for steps in found[0]:
        assert steps[-1] == (25, 0)
        assert max(staleness for _, staleness in steps) >= 5, "the metric does not show the slow rank"


def test_a_restarted_rank_reads_no_further_than_its_checkpoint() -> None:
    chain = iter([Step(version, version + 1) for version in range(9)])
    reader = AgreedReader(lambda: next(chain, None), Ranks(), version=0, digest=digest(0))
    assert [step.version for step in reader.advance(limit=3)] == [1, 2, 3]
    assert reader.advance(limit=3) == [] and reader.version == 3
    assert [step.version for step in reader.advance()] == [4, 5, 6, 7, 8, 9]


# --- a rank that is gone ----------------------------------------------------------------------------------------------


def train(ranks: Ranks, folder: str, die: tuple[int, int] | None) -> list[int]:
    """Versions held at each of the steps to version 6; `die` is the rank that is killed, and at which version."""
    checkpoint = Path(folder) / f"checkpoint-{ranks.rank}"
    target = int(checkpoint.read_text()) if checkpoint.exists() else 0
    chain = iter([Step(version, version + 1) for version in range(6)])
    reader = AgreedReader(lambda: next(chain, None), ranks, version=0, digest=digest(0), ahead=1)
    while reader.version < target:
        reader.advance(target)
    held = [reader.version]
    while reader.version < 6:
        if die == (ranks.rank, reader.version):
            time.sleep(0.2)  # the others are in the barrier
            os.kill(os.getpid(), signal.SIGKILL)
        reader.advance()
        checkpoint.write_text(str(reader.version))
        held.append(reader.version)
    return held


@pytest.mark.parametrize("world", [2, 4])
def test_row_29_a_rank_that_dies_in_the_barrier_is_named_and_all_resume_on_its_version(
    tmp_path: Path, world: int
) -> None:
    victim = world - 1
    began = time.monotonic()
    found = together(train, world, str(tmp_path), (victim, 3), timeout_s=T)
    assert time.monotonic() - began < T + 30
    for rank, error in enumerate(found):
        if rank == victim:
            assert error is None  # killed
            continue
        assert isinstance(error, UnavailableError), error
        assert error.problem == f"rank {victim} of {world} did not answer rank {rank} within {T:g} s"
    assert together(train, world, str(tmp_path), None) == [[3, 4, 5, 6]] * world


def stop_itself(ranks: Ranks, which: int) -> None:
    ranks.exchange(torch.zeros(1))
    if ranks.rank == which:
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.average(torch.zeros(4))


@pytest.mark.parametrize("which", [0, 2])
def test_a_rank_that_hangs_is_named_by_all_others(which: int) -> None:
    with started(stop_itself, 3, which, timeout_s=T) as running:
        for rank, (process, pipe) in running.items():
            if rank != which:
                error = result(pipe)
                assert isinstance(error, UnavailableError) and error.problem.startswith(f"rank {which} of 3"), error
                assert f"read the log of rank {which}" in error.fix
                assert process.is_alive() or process.exitcode == 0
        os.kill(running[which][0].pid or 0, signal.SIGCONT)
        assert isinstance(result(running[which][1]), UnavailableError)  # too late: the others are gone


def test_a_rank_that_never_came_is_named() -> None:
    for error in together(settle, 3, [], timeout_s=0.5, absent=(1,)):
        assert isinstance(error, UnavailableError) and error.problem.startswith("rank 1 of 3 did not answer")


def from_environment(_: Ranks, port: int, kill: bool) -> Any:
    rank = _.rank
    names = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = Ranks.from_environment(T, names)
    total = ranks.average(torch.tensor([float(rank)])).item()
    if kill and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.exchange(torch.zeros(1))
    return total


@pytest.mark.parametrize("kill", [False, True])
def test_ranks_meet_as_the_environment_says_and_notice_when_their_store_is_gone(kill: bool) -> None:
    store = ranks_store()
    port = store.port
    del store
    found = together(from_environment, 2, port, kill)
    if kill:
        assert isinstance(found[1], UnavailableError) and "rank 0" in found[1].problem
    else:
        assert found == [0.5, 0.5]


# --- one batch, one gradient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"cloned_only": True}])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_the_batch_does_not_depend_on_the_number_of_ranks(world: int, options: Any, fraction: float) -> None:
    config = agent_config()
    offline, online = replay(config), replay(config, 3)
    whole, generators = np.random.default_rng(5), [np.random.default_rng(5) for _ in range(world)]
    for step in range(4):
        expected = mixed_sample(offline, online, 16, whole, fraction, **options)
        parts = []
        for rank, generator in enumerate(generators):
            part = slice(rank * 16 // world, (rank + 1) * 16 // world)
            parts.append(mixed_sample(offline, online, 16, generator, fraction, **options, part=part))
        assert {len(part) for part in parts} == {16 // world}
        for name, values in vars(expected).items():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), values), (step, name)
    assert all(generator.bit_generator.state == whole.bit_generator.state for generator in generators)


CONFIGS: list[dict[str, Any]] = [
    {"clip_targets": False},
    {"samples": 2, "reference": "frozen", "value_kind": "expectile"},
]


def learn(ranks: Ranks, folder: str, sources: list[str]) -> list[dict[str, Any]]:
    """Some updates of small agents: gradients of the first, and what the networks hold at the end."""
    return [_learn(ranks, options, folder, source) for options, source in zip(CONFIGS, sources, strict=True)]


def _learn(ranks: Ranks, options: dict[str, Any], folder: str, source: str) -> dict[str, Any]:
    config = agent_config(**options)
    offline, online = replay(config), replay(config, 3)
    learner = Learner(config, normaliser(), seed=3, accelerator="cpu", threads=2, dtype=torch.float32, ranks=ranks)
    if source:
        learner.load(Path(source))
    part = ranks.part(config.learner.batch)

    def sampler(rng: np.random.Generator) -> Batch:
        return mixed_sample(offline, online, config.learner.batch, rng, part=part)

    learner.fit(sampler, 1, stage="sft", cloned=True)
    gradients: dict[str, torch.Tensor] = {}
    for name, optimiser in learner.agent.optimisers.items():
        optimiser.register_step_pre_hook(first_gradient(gradients, name))
    learner.fit(sampler, 3)
    if ranks.rank == 0:
        learner.save(Path(folder) / f"{options}.ckpt")
    return {
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
        "networks": {name: network.flat.detach().numpy() for name, network in learner.agent.networks()},
        "rng": learner.rng.bit_generator.state,
    }


def first_gradient(kept: dict[str, torch.Tensor], name: str) -> Any:
    def keep(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        gradient = optimiser.param_groups[0]["params"][0].grad
        kept.setdefault(name, gradient.clone())

    return keep


def assert_same_update(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for answer in ranks:
        for name, gradient in alone["gradients"].items():
            np.testing.assert_allclose(answer["gradients"][name], gradient, rtol=0, atol=1e-6, err_msg=name)
        for name, flat in ranks[0]["networks"].items():
            assert np.array_equal(answer["networks"][name], flat), f"{name} is not the same on all ranks"
            np.testing.assert_allclose(flat, alone["networks"][name], rtol=0, atol=2e-3, err_msg=name)
        assert answer["rng"] == alone["rng"]


def test_the_gradient_over_ranks_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    """2 and 4 ranks against 1; and the checkpoint of 4 goes on with 2 as with 1."""
    folders = {world: str(tmp_path / str(world)) for world in (1, 2, 4)}
    alone = learn(Ranks(), folders[1], ["", ""])
    four = together(learn, 4, folders[4], ["", ""])
    saved = [f"{folders[4]}/{options}.ckpt" for options in CONFIGS]
    two = together(learn, 2, folders[2], saved)
    resumed = learn(Ranks(), folders[1], saved)
    for number in range(len(CONFIGS)):
        assert_same_update([answer[number] for answer in four], alone[number])
        assert_same_update([answer[number] for answer in two], resumed[number])


def test_batches_that_cannot_be_shared_are_named() -> None:
    ranks = Ranks()
    ranks.world = 3
    with pytest.raises(ConfigError, match="8 samples cannot be shared equally by 3 ranks"):
        Learner(agent_config(), normaliser(), accelerator="cpu", ranks=ranks)
    ranks.world = 2
    with pytest.raises(ConfigError, match="no multiple of policy_batch=6"):
        Learner(agent_config(policy_batch=6), normaliser(), accelerator="cpu", ranks=ranks)
