import errno
import itertools
import os
import signal
import warnings

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, CorruptDataError
from lwd_model.checkpoint import previous, read_checkpoint, write_checkpoint
from lwd_model.learner import Learner
from tests.lwd_model.factory import agent_config, normaliser, replay


def make(seed=0, threads=1, **options):
    config = agent_config(**options)
    store = replay(config)
    learner = Learner(config, normaliser(), seed=seed, accelerator="cpu", threads=threads)
    return learner, lambda rng: store.sample(config.learner.batch, rng)


@pytest.fixture(autouse=True)
def _threads():
    yield
    torch.set_num_threads(1)


def flats(learner):
    return {name: network.flat.detach().clone() for name, network in learner.agent.networks()}


@pytest.mark.parametrize("threads", [1, 2])
def test_resume_is_bit_exact(tmp_path, threads):
    """20 updates = 10 + checkpoint + a new process' learner + 10, in both stages, with decay and moving optimisers."""
    options = {"decay": "cosine", "updates": 20, "critic_warmup": 3}
    whole, sampler = make(threads=threads, **options)
    for _ in range(2):
        whole.fit(sampler, 10, stage="sft")
        whole.fit(sampler, 10)
    first, sampler = make(threads=threads, **options)
    first.fit(sampler, 10, stage="sft")
    first.fit(sampler, 5)
    first.snapshot_version, first.position = 7, {"offset": 42}
    first.save(tmp_path / "learner.ckpt")
    second, sampler = make(seed=99, threads=threads, **options)
    second.load(tmp_path / "learner.ckpt")
    assert (second.snapshot_version, second.position) == (7, {"offset": 42})
    second.fit(sampler, 5)
    second.fit(sampler, 10, stage="sft")
    second.fit(sampler, 10)
    assert second.agent.counters == whole.agent.counters == {"sft": 20, "rl": 20}
    expected, have = flats(whole), flats(second)
    assert all(torch.equal(expected[name], have[name]) for name in expected)
    assert whole.rng.bit_generator.state == second.rng.bit_generator.state
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    for name, optimiser in whole.agent.optimisers.items():
        for key, value in optimiser.state_dict()["state"][0].items():
            assert torch.equal(value, second.agent.optimisers[name].state_dict()["state"][0][key])


def test_resume_from_the_checkpoint_alone_with_online_options(tmp_path):
    learner, sampler = make()
    learner.fit(sampler, 3)
    learner.save(tmp_path / "learner.ckpt")
    online = Learner.resume(tmp_path / "learner.ckpt", {"tau_base": 0.9}, accelerator="cpu")
    assert online.config.learner.tau_base == 0.9 and online.updates == 3
    assert online.agent.normaliser.digest == learner.agent.normaliser.digest
    with pytest.raises(ConfigError, match="tau_bse"):
        Learner.resume(tmp_path / "learner.ckpt", {"tau_bse": 0.9}, accelerator="cpu")


def test_metrics_are_fetched_every_k_updates_and_a_callback_can_stop():
    learner, sampler = make()
    seen = {}

    def on_step(count, metrics):
        seen[count] = metrics
        return count == 6

    assert learner.fit(sampler, 50, on_step=on_step, metrics_every=3) == 6
    assert [count for count, metrics in seen.items() if metrics] == [3, 6]
    assert all(isinstance(value, float) for value in seen[6].values())
    assert {"value/tau", "value/entropy", "divl/critic_loss", "qam/loss", "clone/loss"} <= seen[6].keys()


def test_a_torn_checkpoint_falls_back_to_the_previous_one(tmp_path):
    path = tmp_path / "learner.ckpt"
    learner, sampler = make()
    learner.fit(sampler, 2)
    learner.save(path)
    learner.fit(sampler, 2)
    learner.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 1000])
    fresh, _ = make()
    with pytest.warns(UserWarning, match="torn"):
        fresh.load(path)
    assert fresh.updates == 2
    path.unlink()  # a crash between the two renames leaves only the previous one
    with pytest.warns(UserWarning, match="resuming from"):
        fresh.load(path)
    previous(path).write_bytes(b"")
    with pytest.raises(CorruptDataError, match="no whole checkpoint"):
        fresh.load(path)


@pytest.mark.parametrize("call", range(4))
def test_row_30_a_learner_killed_in_mid_checkpoint_resumes_from_a_whole_one(tmp_path, call):
    """SIGKILL at each step of writing the second checkpoint: one of the two loads, whole, and goes on bit-exact."""
    path = tmp_path / "learner.ckpt"
    learner, sampler = make()
    learner.snapshot_version = 1
    learner.fit(sampler, 2)
    learner.save(path)
    pid = os.fork()
    if pid == 0:
        steps = itertools.count()

        def die(act):
            def step(*arguments):
                if next(steps) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*arguments)

            return step

        os.replace, os.fsync = die(os.replace), die(os.fsync)  # fsync, replace, replace, fsync of the folder
        learner.fit(sampler, 2)
        learner.snapshot_version = 2
        learner.save(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    whole, sampler = make()
    whole.fit(sampler, 4)
    fresh, sampler = make(seed=99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.load(path)
    assert (fresh.updates, fresh.snapshot_version) == ((4, 2) if call == 3 else (2, 1))
    fresh.fit(sampler, 4 - fresh.updates)
    expected, have = flats(whole), flats(fresh)
    assert all(torch.equal(expected[name], have[name]) for name in expected)


def test_another_architecture_is_named_on_both_sides(tmp_path):
    learner, _ = make()
    learner.save(tmp_path / "learner.ckpt")
    other = Learner(agent_config(width=48), normaliser(), accelerator="cpu")
    before = flats(other)
    with pytest.raises(ConfigError, match=r"width=32, this learner .*width=48"):
        other.load(tmp_path / "learner.ckpt")
    assert all(torch.equal(before[name], flat) for name, flat in flats(other).items())
    scalar = Learner(agent_config(value_kind="expectile"), normaliser(), accelerator="cpu")
    with pytest.raises(ConfigError, match="value_kind='distributional'"):
        scalar.load(tmp_path / "learner.ckpt")


ODD = {"architecture": "[1]", "agent": {}, "rng": "{}", "generator": None, "position": "3", "config": "[]", "seed": "x"}


@pytest.mark.parametrize("name", [*ODD, "all"])
def test_a_whole_checkpoint_of_another_version_is_named(tmp_path, name):
    path, (learner, _) = tmp_path / "learner.ckpt", make()
    learner.save(path)
    write_checkpoint(path, {**read_checkpoint(path), name: ODD[name]} if name in ODD else [1])
    previous(path).unlink()
    with pytest.raises((CorruptDataError, ConfigError), match="learner.ckpt"):
        Learner.resume(path, accelerator="cpu")
    if name not in ("config", "seed"):  # a learner of its own
        with pytest.raises((CorruptDataError, ConfigError), match="learner.ckpt"):
            learner.load(path)


def test_a_disk_that_does_not_take_a_checkpoint_keeps_the_one_before_and_its_room(tmp_path, monkeypatch):
    path, (learner, sampler) = tmp_path / "learner.ckpt", make()
    learner.save(path)
    before = path.read_bytes()
    learner.fit(sampler, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        learner.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_checkpoints_hold_no_code(tmp_path):
    """`torch.load(weights_only=True)` refuses anything but tensors and plain values."""
    write_checkpoint(tmp_path / "evil.ckpt", {"agent": print})
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        read_checkpoint(tmp_path / "evil.ckpt")


def test_unresolvable_backups_warn_when_configured():
    with pytest.warns(UserWarning, match="spacing"):
        make(gamma=0.9999, n_step_short=1, interpolate=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(gamma=0.9)


def test_an_unknown_stage_is_refused():
    learner, sampler = make()
    with pytest.raises(ConfigError, match="stage 'dagger'"):
        learner.fit(sampler, 1, stage="dagger")


def test_hg_dagger_weighs_by_clone_weight():
    learner, _ = make()
    config = learner.config
    store = replay(config, episodes=2)  # the second failed: nothing of it is cloned
    data = store.sample(16, np.random.default_rng(0))
    data.clone_weight.zero_()
    before = flats(learner)["policy"]
    learner.fit(lambda rng: data, 1, stage="sft", cloned=True)
    assert torch.equal(learner.agent.policy.flat, before)  # no sample weighs anything


def test_training_leaves_the_processor_as_it_was():
    """Denormals are flushed while it learns; a process that computes other things afterwards has them again."""
    learner, sampler = make()
    learner.fit(sampler, 1, stage="sft")
    assert np.float64(5e-324) * np.float64(1.0) > 0
