import json

import pytest

from infra.errors import ConfigError
from lwd_model.config import (
    LearnerConfig,
    PolicyConfig,
    agent_from_dict,
    from_dict,
    preset,
    to_dict,
)

POLICY = {"obs_dim": 4, "action_dim": 2, "horizon": 5, "instructions": ["a", "b"]}


@pytest.mark.parametrize("name", ["state", "paper"])
def test_presets_survive_json(name):
    config = preset(name, POLICY)
    assert agent_from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_paper_preset_is_the_papers_appendix_b2():
    config = preset("paper", {name: value for name, value in POLICY.items() if name != "horizon"})
    c = config.learner
    assert (c.gamma, c.tau_base, c.alpha, c.ema) == (0.9999, 0.6, 0.3, 0.005)
    assert (c.n_step_short, c.n_step_long, 1 / c.inv_temp) == (1, 10, 2.0)
    assert (c.policy_lr, c.critic_lr, c.decay, c.reference) == (2e-5, 5e-4, "cosine", "frozen")
    assert config.policy.horizon == 30


def test_overrides_win_over_the_preset():
    assert preset("paper", POLICY, inv_temp=10.0).learner.inv_temp == 10.0
    assert preset("paper", POLICY | {"horizon": 7}).policy.horizon == 7
    assert preset("state", POLICY | {"width": 64}).policy.width == 64


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gama": 0.9}, "gama"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": "high"}, "gamma"),
        ({"reference": "thawed"}, "reference"),
        ({"batch": 1.5}, "batch"),
        ({"batch": True}, "batch"),
        ({"policy_batch": 512}, "policy_batch"),
        ({"step_subset": 0}, "step_subset"),
        ({"interpolate": "yes"}, "interpolate"),
    ],
)
def test_a_wrong_learner_option_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        from_dict(LearnerConfig, change, "learner")


def test_a_typo_gets_a_suggestion():
    with pytest.raises(ConfigError) as caught:
        from_dict(LearnerConfig, {"tau_bas": 0.7}, "learner")
    assert "tau_base" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"obs_dim": 0}, "obs_dim"),
        ({"instructions": []}, "instructions"),
        ({"instructions": ["a", "a"]}, "instructions"),
        ({"instructions": "a"}, "instructions"),
        ({"time_features": 7}, "time_features"),
    ],
)
def test_a_wrong_policy_field_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        from_dict(PolicyConfig, POLICY | change, "policy")


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="horizon"):
        from_dict(PolicyConfig, {"obs_dim": 4, "action_dim": 2, "instructions": ["a"]}, "policy")


def test_unknown_preset_and_part():
    with pytest.raises(ConfigError, match="laptop"):
        preset("laptop", POLICY)
    with pytest.raises(ConfigError, match="polcy"):
        agent_from_dict({"polcy": POLICY})


def test_task_index_names_what_the_policy_knows():
    config = from_dict(PolicyConfig, POLICY, "policy")
    assert config.task_index("b") == 1
    with pytest.raises(ConfigError, match="juggle") as caught:
        config.task_index("juggle")
    assert "a; b" in caught.value.fix
