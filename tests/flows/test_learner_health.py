"""A learner with a NaN goes back to its good checkpoint, draws other numbers, and stops after K falls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flows.learner_health import GOOD, PENDING, Recovery
from flows.online_learner import ROWS, _resumed_rows
from flows.params import HealthParams
from flows.stages.common import CHECKPOINT
from infra.errors import DivergedError, LeaseLostError
from lwd_model.checkpoint import previous, write_checkpoint
from lwd_model.health import weights_problem
from lwd_model.learner import Learner
from lwd_model.ranks import Ranks
from tests.lwd_model.factory import agent_config, normaliser, replay
from tests.lwd_model.rank_processes import together

PARAMS = HealthParams(healthy_after=2, falls=3)


def made(ranks: Ranks | None = None, **options: float) -> Learner:
    learner = Learner(agent_config(**options), normaliser(), accelerator="cpu", ranks=ranks)
    learner.agent.start_rl()
    return learner


def update(learner: Learner) -> dict[str, float]:
    store, size = replay(learner.config), learner.config.learner.batch
    learner.fit(lambda rng: store.sample(size, rng, part=learner.ranks.part(size)), 1)
    return {name: float(value) for name, value in learner.numbers.items()}


def poison(learner: Learner, name: str | None = None) -> None:
    for kind, network in learner.agent.networks():
        if name is None or kind == name:
            with torch.no_grad():
                network.flat[0] = math.nan
            return
    raise AssertionError(f"no network {name}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("flows.learner_health.OFFLINE", tmp_path / "offline")
    made().save(tmp_path / "offline" / CHECKPOINT)
    return tmp_path


def weights(learner: Learner) -> list[torch.Tensor]:
    return [network.flat.detach().clone() for _, network in learner.agent.networks()]


def test_each_network_is_looked_at() -> None:
    names = [name for name, _ in made().agent.networks()]
    assert len(names) == len(set(names)) > 3
    for name in names:
        learner = made()
        assert weights_problem(learner.agent.networks()) is None
        poison(learner, name)
        assert weights_problem(learner.agent.networks()) == f"weights of {name} are not finite"


def test_a_checkpoint_is_good_once_healthy_updates_followed_it(folder: Path) -> None:
    learner = made()
    recovery = Recovery(learner, folder, PARAMS)

    def save() -> None:
        recovery.grow_good()
        learner.save(folder / CHECKPOINT)
        recovery.saved()

    save()
    assert (folder / PENDING).exists() and not (folder / GOOD).exists()
    kept = weights(learner)
    for _ in range(2):
        assert recovery.judge(update(learner)) is None
    save()
    assert (folder / GOOD).exists()
    poison(learner)
    assert recovery.judge_weights() is not None
    recovery.fall("the weights")
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(learner), strict=True))
    assert learner.updates == 0 and not (folder / PENDING).exists()
    assert learner.position["falls"] == 1


def test_nan_weights_are_seen_in_the_next_update(folder: Path) -> None:
    learner = made()
    poison(learner)
    problem = Recovery(learner, folder, PARAMS).judge(update(learner))
    assert problem is not None and "nan" in problem


def test_falls_in_a_row_end_in_a_named_error(folder: Path) -> None:
    """Each fall draws other numbers, the last checkpoint is the good one, and the next life stops at its first fall."""
    learner = made()
    recovery, draws = Recovery(learner, folder, PARAMS), []

    def learn() -> None:
        for _ in range(PARAMS.falls):
            poison(learner)
            recovery.fall(str(recovery.judge(update(learner))))
            draws.append(json.dumps(learner.rng.bit_generator.state))

    with pytest.raises(DivergedError, match="3 times in a row .* is nan"):
        learn()
    assert len(set(draws)) == len(draws) == 2
    left = made()
    left.load(folder / CHECKPOINT)
    assert weights_problem(left.agent.networks()) is None and left.updates == 0
    assert left.position["falls"] == 2
    with pytest.raises(DivergedError, match="3 times in a row"):
        Recovery(left, folder, PARAMS).fall("again")


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _odd(path: Path) -> None:
    write_checkpoint(path, {"another": "version"})
    previous(path).unlink()


def _wider(path: Path) -> None:
    Learner(agent_config(width=48), normaliser(), accelerator="cpu").save(path)
    previous(path).unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_torn, _odd, _wider, _folder])
def test_a_good_checkpoint_that_cannot_be_loaded_is_as_none(folder: Path, damage: Callable[[Path], None]) -> None:
    learner = made()
    update(learner)
    learner.save(folder / GOOD)
    update(learner)
    damage(folder / GOOD)
    Recovery(learner, folder, PARAMS).fall("a test")
    assert learner.updates == 0 and learner.position["falls"] == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(learner), weights(made()), strict=True))
    made().load(folder / CHECKPOINT)


def test_a_policy_whose_actions_are_not_finite_is_seen_before_it_is_published(folder: Path) -> None:
    """A bit flipped in the EMA that robots run: no loss shows it, and every weight is finite."""
    learner = made()
    with torch.no_grad():
        learner.agent.deployed.flat.mul_(1e30)
    recovery = Recovery(learner, folder, PARAMS)
    assert recovery.judge(update(learner)) is None and weights_problem(learner.agent.networks()) is None
    assert "not finite" in str(recovery.judge_weights())
    recovery.fall("the actions")
    assert recovery.judge_weights() is None


@pytest.mark.parametrize(
    "torn", [b'{"update": 2, "divl', b"\xff\xfe", b"[]", b"3", b'{"update": 1e999}', b"[" * 99_999]
)
def test_a_torn_row_of_the_metrics_keeps_no_learner_from_starting(tmp_path: Path, torn: bytes) -> None:
    rows = [b'{"update": 1, "a": 0.5}', torn, b'{"update": 3}', b'{"update": 4}', torn]
    (tmp_path / ROWS).write_bytes(b"\n".join(rows))
    _resumed_rows(SimpleNamespace(folder=tmp_path, updates=3))  # type: ignore[arg-type]
    assert (tmp_path / ROWS).read_bytes() == b'{"update": 1, "a": 0.5}\n{"update": 3}\n'


def test_a_fall_without_the_lease_writes_nothing(folder: Path) -> None:
    def lost() -> None:
        raise LeaseLostError("another learner holds it", "stop one")

    recovery = Recovery(made(), folder, PARAMS, lost)
    with pytest.raises(LeaseLostError):
        recovery.fall("a test")
    assert not (folder / CHECKPOINT).exists()


def _two(ranks: Ranks, folder: Path) -> tuple[str | None, str | None, int, list[float]]:
    import flows.learner_health as health

    health.OFFLINE = folder / "offline"
    learner = made(ranks)
    recovery = Recovery(learner, folder, PARAMS)
    quiet = recovery.judge({"divl/q": 0.5})
    problem = recovery.judge({"divl/q": math.nan if ranks.rank == 1 else 0.5})
    recovery.fall(str(problem))
    return quiet, problem, learner.position["falls"], list(np.round(learner.rng.random(3), 12))


def test_two_ranks_fall_together(folder: Path) -> None:
    one, two = together(_two, 2, folder)
    assert (one[0], two[0]) == (None, None)
    assert "another rank" in one[1] and "divl/q is nan" in two[1]
    assert one[2:] == two[2:] and one[2] == 1


def _one_cannot(ranks: Ranks, folder: Path, missing: bool) -> tuple[int, list[float]]:
    import flows.learner_health as health

    health.OFFLINE = folder / "offline"
    learner = made(ranks)
    update(learner)
    own = folder / f"seen by {ranks.rank}"  # a file system that shows one machine what it does not show the other
    learner.save(own / GOOD)
    if ranks.rank == 1:
        (own / GOOD).unlink() if missing else _torn(own / GOOD)
    Recovery(learner, own, PARAMS).fall("a test")
    return learner.updates, list(np.round(learner.rng.random(3), 12))


@pytest.mark.parametrize("missing", [False, True])
def test_two_ranks_go_back_to_the_same_checkpoint(folder: Path, missing: bool) -> None:
    one, two = together(_one_cannot, 2, folder, missing)
    assert one == two and one[0] == 0
