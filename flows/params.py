"""`params.yaml`, typed: the parameters of the pipeline and of the online flow, validated before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from flows.spec import Section
from infra.errors import ConfigError, LwdError
from infra.fleet.tasks import TASKS
from infra.yaml_file import read_yaml
from lwd_model.config import PRESETS, preset

_OVERRULED = {"offline": ("updates",), "online": ("updates", "tau_base")}
"""Options of the learner that a stage has a parameter of its own for."""


class PolicyParams(Section):
    preset: str = "state"
    horizon: int = Field(5, ge=1)
    noise_scale: float = Field(1.0, ge=0, description="of the noise that deployed policies start from")


class DemonstrationParams(Section):
    per_task: int = Field(gt=0)
    noise: float = Field(0.15, ge=0)


class SftParams(Section):
    updates: int = Field(gt=0)
    early: int = Field(gt=0, description="updates after which the early checkpoint is kept")
    refused_max: float = Field(0.2, ge=0, le=1, description="share of the demonstrations that the contract may refuse")


class RolloutParams(Section):
    per_task: int = Field(gt=0)
    early_share: float = Field(0.33, ge=0, le=1)


class PlayParams(Section):
    per_task: int = Field(gt=0)


class FaultParams(Section):
    planted: int = Field(0, ge=0)


class OfflineParams(Section):
    updates: int = Field(gt=0)
    learner: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's LearnerConfig")


class EvaluateParams(Section):
    episodes: int = Field(gt=0)
    seed: int = Field(1_000_000, ge=0, lt=2**32)
    gate_max: int | None = Field(
        None, gt=0, description="per task; ask no further, though the gate's file goes on to its `episodes.max`"
    )
    curve: int = Field(
        10, ge=0, description="episodes per task for each policy on the online learning curve; 0 is none"
    )


class HealthParams(Section):
    """When the learner has diverged; the limits are explained at `lwd_model.health.HealthLimits`."""

    loss: float = Field(1_000.0, gt=0)
    value: float = Field(10.0, gt=0)
    gradient: float = Field(1e6, gt=0)
    ratio: float = Field(50.0, gt=1)
    floor: float = Field(1.0, gt=0)
    healthy_after: int = Field(50, gt=0, description="updates after which a checkpoint that led on well is good")
    falls: int = Field(3, gt=0, description="returns to the good checkpoint in a row before the learner stops")


class OnlineParams(Section):
    robots: int = Field(4, ge=0, description="simulated here, in the learning cohort; 0 where real ones are enrolled")
    production: int = Field(0, ge=0, description="simulated beside them: robots that run the champion")
    canary: int = Field(0, ge=0, description="simulated beside them: robots that run what is on trial")
    pace: float = Field(1.0, ge=0, description="multiple of real time; 0 is as fast as possible")
    operator: float = Field(0.5, ge=0, le=1, description="share of the learning cohort's episodes that one attends")
    updates: int = Field(gt=0)
    updates_per_episode: float = Field(gt=0)
    publish_every: int = Field(50, gt=0)
    tau_base: float = Field(0.9, gt=0, lt=1)
    health: HealthParams = HealthParams()
    ranks: int = Field(1, gt=0, description="learner processes, each with its share of every batch")
    learner: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's LearnerConfig")


class Params(Section):
    """All of `params.yaml`; see the comments there."""

    seed: int = Field(0, ge=0, lt=2**32)
    tasks: tuple[str, ...] = Field(min_length=1)
    workers: int = Field(2, gt=0)
    policy: PolicyParams = PolicyParams()
    demonstrations: DemonstrationParams
    sft: SftParams
    rollouts: RolloutParams
    play: PlayParams
    faults: FaultParams = FaultParams()
    offline: OfflineParams
    evaluate: EvaluateParams
    online: OnlineParams

    @model_validator(mode="after")
    def _can_be_run(self) -> Params:
        """What a stage would stumble over only hours later."""
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks: {task!r} is none; there are {', '.join(TASKS)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: one stands twice in {', '.join(self.tasks)}")
        if self.sft.early > self.sft.updates:
            raise ValueError(f"sft.early: {self.sft.early} is after the last of {self.sft.updates} updates")
        sizes = {"obs_dim": 1, "action_dim": 1, "horizon": self.policy.horizon, "instructions": ("",)}
        for stage, options in (("offline", self.offline.learner), ("online", self.online.learner)):
            for name in _OVERRULED[stage]:
                if name in options:
                    raise ValueError(f"{stage}.learner: {name} is said again; give it as {stage}.{name}")
            try:
                preset(self.policy.preset, sizes, **options)
            except LwdError as error:
                where = f"{stage}.learner" if self.policy.preset in PRESETS else "policy.preset"
                raise ValueError(f"{where}: {error.problem}; {error.fix}") from error
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a parameter file.

    Raises:
        ConfigError: the file is missing or not YAML, or a parameter is unknown, missing or out of range.
    """
    raw = read_yaml(path, "parameters", "run from the repository's root, or pass --params")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")  # of `Params` as a whole: it says where
        raise ConfigError(
            f"{path}: {where}: {message}" if where else f"{path}: {message}",
            f"correct {where!r} in {path}" if where else f"correct {path}",
        ) from error
