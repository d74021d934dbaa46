"""What a learner is made of, as data: frozen dataclasses, validated when they are made, with two presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from infra.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a flow policy; all that a robot needs to rebuild it.

    Attributes:
        obs_dim, action_dim: D and A of the embodiment.
        horizon: H, actions in a chunk.
        instructions: the sentences that the policy knows; a task is an index into them.
        width, blocks: of the trunk. `kind` residual: `blocks` residual LayerNorm blocks of two layers; plain: `blocks`
            layers (for comparison with published code).
        time_features: size of the sinusoidal embedding of flow time, even.
        flow_steps: N of the deployed Euler sampler and of QAM.
        noise_scale: standard deviation of the noise that deployment starts from (training always uses 1).
    """

    obs_dim: int
    action_dim: int
    horizon: int
    instructions: tuple[str, ...]
    width: int = 256
    blocks: int = 3
    kind: Literal["residual", "plain"] = "residual"
    time_features: int = 64
    flow_steps: int = 10
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        _check(
            self,
            {name: (1, None) for name in ("obs_dim", "action_dim", "horizon", "width", "blocks", "flow_steps")}
            | {"time_features": (2, None), "noise_scale": (0, None)},
        )
        if not self.instructions or len(set(self.instructions)) != len(self.instructions):
            raise ConfigError("policy: instructions are empty or repeated", "list each task's instruction once")
        if self.time_features % 2:
            raise ConfigError(
                f"policy: time_features={self.time_features} is odd", "give an even number, for example 64"
            )

    def task_index(self, instruction: str) -> int:
        """Index of an instruction.

        Raises:
            ConfigError: the policy was not made for it.
        """
        try:
            return self.instructions.index(instruction)
        except ValueError:
            known = "; ".join(self.instructions)
            raise ConfigError(
                f"the policy does not know the instruction {instruction!r}", f"use one of: {known}; or train with it"
            ) from None


@dataclass(frozen=True)
class CriticConfig:
    """Shape of the critic's heads and of the value network.

    Attributes:
        width, blocks, kind: of each trunk, as in `PolicyConfig`.
        heads: independent critics, evaluated in one batched call.
        v_min, v_max, atoms: support of the value distribution (appendix A1).
    """

    width: int = 256
    blocks: int = 3
    kind: Literal["residual", "plain"] = "residual"
    heads: int = 2
    v_min: float = -0.1
    v_max: float = 1.1
    atoms: int = 201

    def __post_init__(self) -> None:
        _check(self, {"width": (1, None), "blocks": (1, None), "heads": (1, None), "atoms": (2, None)})


@dataclass(frozen=True)
class LearnerConfig:
    """Options of DIVL and QAM; ALGORITHM options by their names there. Defaults are the `state` preset's.

    Attributes:
        gamma: discount per control step.
        n_step_short, n_step_long: chunks in the TD window of a short / long task (eq. 19).
        value_kind: `distributional` (DIVL) or `expectile` (IQL's scalar value, the ablation).
        tau_base, alpha, tau_min, tau_max: quantile level and its uncertainty sensitivity (eq. 18).
        tau_kind: `adaptive`, or `constant` = tau_base everywhere (the ablation).
        interpolate, clip_targets: remedies against sticking values; the paper has neither.
        time_limit: `failure` (r = 0, no bootstrap) or `bootstrap`.
        takeover: what an n-step window does at the start of an operator's takeover.
        inv_temp: 1/lambda. sigma, rollout, endpoint: of QAM. samples: trajectories per state.
        step_subset: flow steps that enter QAM's loss per update, drawn without replacement; None is all.
        reference: `frozen` (the paper) or `ema_bc` (an EMA of a flow cloned on the replay).
        cloned: what `ema_bc` clones: `all`, or `successes` (demonstrations, takeovers, successful episodes).
        critic_grad: `mean` or `min` over the heads.
        critic_warmup: updates at the start of RL that train critic, value and clone only.
        batch, policy_batch: states per update of DIVL and cloning, and of QAM (the first of the same batch).
        policy_lr, critic_lr: Adam; `decay` cosine to zero over `updates`, or constant. weight_decay: policy only.
        grad_clip: norm; 0 is off.
        ema, deploy_ema: rates of targets and reference, and of the deployed policy.
        online_fraction: share of online samples in a batch, exact.
        updates: planned length, for the decay.
    """

    gamma: float = 0.99
    n_step_short: int = 4
    n_step_long: int = 8
    value_kind: Literal["distributional", "expectile"] = "distributional"
    tau_base: float = 0.6
    alpha: float = 0.3
    tau_min: float = 0.05
    tau_max: float = 0.95
    tau_kind: Literal["adaptive", "constant"] = "adaptive"
    interpolate: bool = True
    clip_targets: bool = True
    time_limit: Literal["failure", "bootstrap"] = "failure"
    takeover: Literal["continue", "cut", "failure"] = "cut"
    inv_temp: float = 10.0
    sigma: Literal["memoryless", "printed"] = "memoryless"
    rollout: Literal["policy", "reference", "reference_iw"] = "policy"
    endpoint: Literal["generated", "replay_grad"] = "generated"
    samples: int = 1
    step_subset: int | None = 5
    reference: Literal["frozen", "ema_bc"] = "ema_bc"
    cloned: Literal["all", "successes"] = "successes"
    critic_grad: Literal["mean", "min"] = "mean"
    critic_warmup: int = 0
    batch: int = 256
    policy_batch: int = 64
    policy_lr: float = 3e-4
    critic_lr: float = 5e-4
    decay: Literal["cosine", "constant"] = "constant"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.005
    deploy_ema: float = 0.005
    online_fraction: float = 0.5
    updates: int = 1000

    def __post_init__(self) -> None:
        unit = (0.0, 1.0)
        _check(
            self,
            {name: unit for name in ("gamma", "tau_base", "tau_min", "tau_max", "ema", "deploy_ema", "online_fraction")}
            | {name: (1, None) for name in ("n_step_short", "n_step_long", "batch", "samples", "updates")}
            | {name: (0, None) for name in ("alpha", "inv_temp", "critic_warmup", "weight_decay", "grad_clip")}
            | {"policy_lr": (0, 1), "critic_lr": (0, 1), "policy_batch": (1, self.batch)},
        )
        if self.step_subset is not None and self.step_subset < 1:
            raise ConfigError(f"learner: step_subset={self.step_subset}", "give 1 or more steps, or null for all")


@dataclass(frozen=True)
class AgentConfig:
    """A whole agent: three networks and how they learn."""

    policy: PolicyConfig
    critic: CriticConfig = field(default_factory=CriticConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        subset, steps = self.learner.step_subset, self.policy.flow_steps
        if subset is not None and subset > steps:
            raise ConfigError(
                f"learner: step_subset={subset} exceeds flow_steps={steps}", "lower it, or use null for all"
            )

    def architecture(self) -> dict[str, Any]:
        """What a checkpoint must agree on: every field that decides a tensor's shape or meaning."""
        policy = {k: v for k, v in to_dict(self.policy).items() if k not in ("flow_steps", "noise_scale")}
        return {"policy": policy, "critic": to_dict(self.critic), "value_kind": self.learner.value_kind}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "state": {"policy": {"horizon": 5}, "critic": {}, "learner": {}},
    "paper": {
        "policy": {"horizon": 30},
        "critic": {},
        "learner": {
            "gamma": 0.9999, "n_step_short": 1, "n_step_long": 10, "inv_temp": 0.5, "reference": "frozen",
            "takeover": "continue", "interpolate": False, "clip_targets": False, "step_subset": None,
            "policy_lr": 2e-5, "critic_lr": 5e-4, "decay": "cosine", "weight_decay": 0.01, "policy_batch": 256,
        },
    },
}  # fmt: skip


def preset(name: str, policy: Mapping[str, Any], **learner: Any) -> AgentConfig:
    """An agent's configuration from a preset.

    Args:
        name: `state` or `paper`.
        policy: the embodiment's fields of `PolicyConfig` (dimensions, instructions), and overrides.
        learner: overrides of `LearnerConfig`.

    Raises:
        ConfigError: unknown preset or field, or a value out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown", f"use one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    return AgentConfig(
        from_dict(PolicyConfig, {**chosen["policy"], **policy}, "policy"),
        from_dict(CriticConfig, chosen["critic"], "critic"),
        from_dict(LearnerConfig, {**chosen["learner"], **learner}, "learner"),
    )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def agent_from_dict(data: Mapping[str, Any]) -> AgentConfig:
    """The inverse of `to_dict` of an `AgentConfig`.

    Raises:
        ConfigError: naming the field.
    """
    if unknown := data.keys() - {"policy", "critic", "learner"}:
        raise ConfigError(f"agent: unknown part {sorted(unknown)[0]!r}", "give policy, critic and learner")
    return AgentConfig(
        from_dict(PolicyConfig, data.get("policy", {}), "policy"),
        from_dict(CriticConfig, data.get("critic", {}), "critic"),
        from_dict(LearnerConfig, data.get("learner", {}), "learner"),
    )


def from_dict(cls: type[C], data: Mapping[str, Any], where: str) -> C:
    """Build a configuration dataclass from plain values.

    Raises:
        ConfigError: an unknown or missing field, a wrong type or a value out of range; the message names the field.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown field {name!r}", hint)
        values[name] = _coerce(value, hints[name], f"{where}: {name}")
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: field {name!r} is missing", f"add {name}")
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{where}={value!r} is no {getattr(hint, '__name__', hint)}", "correct its value")
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={value!r} is unknown", f"use one of {', '.join(map(str, args))}")
        return value
    if origin is types.UnionType:
        return None if value is None else _coerce(value, next(a for a in args if a is not type(None)), where)
    if origin is tuple:
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise wrong
        return tuple(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise wrong
    if not isinstance(value, hint):
        raise wrong
    return value


def _check(config: Any, bounds: Mapping[str, tuple[float | None, float | None]]) -> None:
    where = type(config).__name__.removesuffix("Config").lower()
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        low, high = bounds.get(f.name, (None, None))
        if isinstance(value, float) and not math.isfinite(value):  # nothing compares with NaN
            raise ConfigError(f"{where}: {f.name}={value!r} is not finite", "give a number")
        if (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"{where}: {f.name}={value!r} is out of range", f"keep it within [{low}, {high}]")
