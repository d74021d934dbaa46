"""`params.yaml`, typed: the parameters of the pipeline and of the online flow, validated before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.errors import ConfigError
from infra.yaml_file import read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyParams(_Section):
    preset: str = "state"
    horizon: int = Field(5, ge=1)
    noise_scale: float = Field(1.0, ge=0, description="of the noise that deployed policies start from")


class DemonstrationParams(_Section):
    per_task: int = Field(gt=0)
    noise: float = Field(0.15, ge=0)


class SftParams(_Section):
    updates: int = Field(gt=0)
    early: int = Field(gt=0, description="updates after which the early checkpoint is kept")
    refused_max: float = Field(0.2, ge=0, le=1, description="share of the demonstrations that the contract may refuse")


class RolloutParams(_Section):
    per_task: int = Field(gt=0)
    early_share: float = Field(0.33, ge=0, le=1)


class PlayParams(_Section):
    per_task: int = Field(ge=0)


class FaultParams(_Section):
    planted: int = Field(0, ge=0)


class OfflineParams(_Section):
    updates: int = Field(gt=0)
    learner: dict[str, Any] = Field(default_factory=dict, description="overrides of the preset's LearnerConfig")


class EvaluateParams(_Section):
    episodes: int = Field(gt=0)
    seed: int = 1_000_000
    gate_max: int | None = Field(
        None, gt=0, description="per task; ask no further, though the gate's file goes on to its `episodes.max`"
    )
    curve: int = Field(
        10, ge=0, description="episodes per task for each policy on the online learning curve; 0 is none"
    )


class HealthParams(_Section):
    """When the learner has diverged; the limits are explained at `lwd_model.health.HealthLimits`."""

    loss: float = Field(1_000.0, gt=0)
    value: float = Field(10.0, gt=0)
    gradient: float = Field(1e6, gt=0)
    ratio: float = Field(50.0, gt=1)
    floor: float = Field(1.0, gt=0)
    healthy_after: int = Field(50, gt=0, description="updates after which a checkpoint that led on well is good")
    falls: int = Field(3, gt=0, description="returns to the good checkpoint in a row before the learner stops")


class OnlineParams(_Section):
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


class Params(_Section):
    """All of `params.yaml`; see the comments there."""

    seed: int = 0
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
        raise ConfigError(f"{path}: {where}: {first['msg']}", f"correct {where!r} in {path}") from error
