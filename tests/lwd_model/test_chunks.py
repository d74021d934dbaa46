"""The replay: every start is there, padded and masked; draws are fair and reproducible; removal leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.episode import Episode
from infra.errors import ConfigError, ConflictError
from lwd_model.chunks import Batch, Replay, mixed_sample
from lwd_model.returns import nstep_fields

INSTRUCTIONS = ("open the drawer", "close the window")
HORIZON, GAMMA = 4, 0.9
Make = Callable[..., Episode]


def replay(**options: Any) -> Replay:
    return Replay(INSTRUCTIONS, HORIZON, GAMMA, **options)


def everything(store: Replay) -> Batch:
    return store._gather(np.arange(len(store)))


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("padding", ["repeat", "zeros"])
@pytest.mark.parametrize("nstep", [1, 3])
def test_09_every_start_is_a_sample_padded_and_masked(make_episode: Make, padding: str, nstep: int) -> None:
    episodes = [make_episode(0, steps=9), make_episode(1, steps=1), make_episode(2, steps=6, success=False)]
    store = replay(padding=padding)
    for episode in episodes:
        store.add(episode, nstep)
    batch = everything(store)
    assert len(batch) == len(store) == 16
    row = 0
    for episode in episodes:
        window = nstep_fields(episode.rewards, episode.intervention, episode.outcome, HORIZON, nstep, GAMMA)
        for t in range(episode.steps):
            real = min(HORIZON, episode.steps - t)
            chunk = np.zeros((HORIZON, 5), np.float32)
            chunk[:real] = episode.actions[t : t + real]
            if padding == "repeat":
                chunk[real:] = episode.actions[t + real - 1]
            assert batch.mask[row].tolist() == [j < real for j in range(HORIZON)]
            np.testing.assert_array_equal(batch.actions[row].numpy(), chunk)
            np.testing.assert_array_equal(batch.obs[row].numpy(), episode.observations[t])
            np.testing.assert_array_equal(batch.next_obs[row].numpy(), episode.observations[window.bootstrap_index[t]])
            assert batch.reward[row].item() == pytest.approx(window.reward[t])
            assert batch.discount[row].item() == pytest.approx(window.discount[t])
            assert batch.mc_return[row].item() == pytest.approx(episode.success * GAMMA ** (episode.steps - 1 - t))
            row += 1


def test_dtypes_are_the_documented_ones(make_episode: Make) -> None:
    store = replay()
    store.add(make_episode())
    batch = store.sample(3, np.random.default_rng(0))
    assert {name: str(value.dtype).removeprefix("torch.") for name, value in vars(batch).items()} == {
        "obs": "float32", "next_obs": "float32", "task": "int64", "actions": "float32", "mask": "bool",
        "reward": "float32", "discount": "float32", "mc_return": "float32", "intervention": "bool",
        "clone_weight": "float32", "index": "int64", "online": "bool",
    }  # fmt: skip
    assert len(batch[:2]) == 2 and same(batch.to("cpu"), batch)


def operated(make_episode: Make, seed: int, taken: slice, **fields: Any) -> Episode:
    intervention = np.zeros(10, bool)
    intervention[taken] = True
    return make_episode(seed, steps=10, intervention=intervention, **fields)


@pytest.mark.parametrize("takeover", ["cut", "failure"])
def test_chunks_are_masked_at_a_takeover_that_ends_the_window(make_episode: Make, takeover: str) -> None:
    episode = operated(make_episode, 0, slice(6, 10))
    store = replay(takeover=takeover)
    store.add(episode, 2)
    batch = everything(store)
    assert batch.mask.sum(1).tolist() == [4, 4, 4, 3, 2, 1, 4, 3, 2, 1]
    np.testing.assert_array_equal(batch.actions[5].numpy(), np.repeat(episode.actions[5:6], 4, 0))
    through = replay(takeover="continue")
    through.add(episode, 2)
    assert everything(through).mask.sum(1).tolist() == [4] * 7 + [3, 2, 1]


def test_clone_weights_follow_what_is_worth_imitating(make_episode: Make) -> None:
    cases = [
        (make_episode(0, steps=10, source="demo"), [1] * 10),
        (make_episode(1, steps=10, source="demo", success=False), [0] * 10),
        (make_episode(2, steps=10, source="rollout"), [1] * 10),
        (make_episode(3, steps=10, source="rollout", success=False), [0] * 10),
        (operated(make_episode, 4, slice(5, 10)), [0] * 5 + [1] * 5),  # the takeover succeeds, the robot did not
        (operated(make_episode, 5, slice(5, 10), success=False), [0] * 5 + [1] * 5),
        (operated(make_episode, 6, slice(3, 5)), [0] * 3 + [1] * 7),  # handed back, then success
        (operated(make_episode, 7, slice(3, 5), success=False), [0] * 3 + [1] * 2 + [0] * 5),
    ]
    twice = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0], bool)  # what the robot did between two takeovers led nowhere
    cases.append((make_episode(8, steps=10, intervention=twice), [0, 0, 1, 1, 0, 0, 1, 1, 1, 1]))
    for episode, expected in cases:
        store, whole = replay(), replay(cloned="all")
        store.add(episode)
        whole.add(episode)
        assert everything(store).clone_weight.tolist() == expected
        assert everything(whole).clone_weight.tolist() == [1] * 10


def test_draws_are_uniform_over_starts_or_balanced_over_tasks(make_episode: Make) -> None:
    store = replay()
    store.add(make_episode(0, steps=90))
    store.add(make_episode(1, steps=10, instruction=INSTRUCTIONS[1], success=False))
    rng = np.random.default_rng(0)
    uniform = store.sample(20_000, rng)
    assert (uniform.task == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    counts = torch.bincount(uniform.index, minlength=100)
    assert counts.min() > 130 and counts.max() < 270  # 200 ± 5 standard deviations
    balanced = store.sample(20_000, rng, balanced=True)
    assert (balanced.task == 1).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert set(balanced.index.tolist()) == set(range(100))
    cloned = store.sample(1_000, rng, cloned_only=True)
    assert (cloned.clone_weight == 1).all() and (cloned.task == 0).all()


def test_the_generator_alone_decides_what_is_drawn(make_episode: Make) -> None:
    stores = [replay(), replay()]
    for store in stores:
        for seed in range(4):
            store.add(make_episode(seed))
    for options in ({}, {"balanced": True}, {"cloned_only": True}):
        a, b = (store.sample(64, np.random.default_rng(7), **options) for store in stores)
        assert same(a, b)
        assert not same(a, stores[0].sample(64, np.random.default_rng(8), **options))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 9)), max_size=30))
@settings(max_examples=40, deadline=None)
def test_adds_and_removes_equal_a_replay_of_what_is_left(
    make_episode: Make, moves: list[tuple[bool, int, int]]
) -> None:
    store, left = replay(), {}
    for adding, seed, steps in moves:
        episode = make_episode(seed, steps=steps)
        held = episode.episode_id in left
        if adding and not held:
            store.add(episode, 2)
            left[episode.episode_id] = episode
        elif not adding:
            assert store.remove(episode.episode_id) is held
            left.pop(episode.episode_id, None)
    assert store.episodes == tuple(left)
    fresh = replay()
    for episode in left.values():
        fresh.add(episode, 2)
    assert len(store) == len(fresh)
    if left:
        assert same(everything(store), everything(fresh))
        draws = [s.sample(16, np.random.default_rng(0), balanced=True) for s in (store, fresh)]
        assert same(*draws)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 16), (0.0, 0), (1.0, 31), (0.1, 3)])
def test_mixed_batches_hold_exactly_the_fraction(make_episode: Make, fraction: float, count: int) -> None:
    offline, online = replay(), replay()
    offline.add(make_episode(0))
    online.add(make_episode(1))
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = mixed_sample(offline, online, 31, rng, fraction)
        assert len(batch) == 31 and int(batch.online.sum()) == count
        expected = everything(online).obs[batch.index[batch.online]]
        assert torch.equal(batch.obs[batch.online], expected)


def test_mixed_batches_come_from_the_replay_that_has_samples(make_episode: Make) -> None:
    full, rng = replay(), np.random.default_rng(0)
    full.add(make_episode(0))
    assert not mixed_sample(full, replay(), 8, rng).online.any()
    assert mixed_sample(replay(), full, 8, rng).online.all()
    with pytest.raises(ConfigError, match="empty"):
        mixed_sample(replay(), replay(), 8, rng)
    with pytest.raises(ConfigError, match=r"online_fraction=1\.5"):
        mixed_sample(full, full, 8, rng, 1.5)


def test_wrong_episodes_are_named(make_episode: Make) -> None:
    store, first = replay(), make_episode(0)
    with pytest.raises(ConfigError, match="empty"):
        store.sample(1, np.random.default_rng(0))
    store.add(first)
    with pytest.raises(ConflictError, match=first.episode_id):
        store.add(first)
    with pytest.raises(ConfigError, match="'juggle'"):
        store.add(make_episode(1, instruction="juggle"))
    with pytest.raises(ConfigError, match="8-D observations"):
        store.add(make_episode(2, obs_dim=8))
    with pytest.raises(ConfigError, match="12 observations for 12 actions"):
        store.add(make_episode(3, observations=np.zeros((12, 7), np.float32)))
    with pytest.raises(ConfigError, match="padding='wrap'"):
        replay(padding="wrap")
    assert store.episodes == (first.episode_id,)
