"""What several stages share: paths, the agent's configuration, progress over episodes, metrics as files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.params import Params
from infra.episode import Episode
from infra.errors import CorruptDataError
from infra.fleet.features import FEATURES
from infra.fleet.scene import ACTION_DIM
from infra.fleet.tasks import TASKS
from lwd_model.chunks import Replay
from lwd_model.config import AgentConfig, LearnerConfig, preset

CONTRACTS = Path("data/contracts")
DEMONSTRATIONS, ROLLOUTS, PLAY = Path("data/demonstrations"), Path("data/rollouts"), Path("data/play")
QUARANTINE, BUFFER, EVALUATION, REPORT = (
    Path("data/quarantine"), Path("data/buffer"), Path("data/evaluation"), Path("data/report"),
)  # fmt: skip
SFT, OFFLINE = Path("models/sft"), Path("models/offline")
CHECKPOINT, BUNDLE, EARLY = "learner.ckpt", "bundle", "early"


def agent_config(params: Params, **learner: Any) -> AgentConfig:
    """The agent for this fleet's embodiment: the whole suite's instructions, so that tasks can be added later."""
    policy = {
        "obs_dim": len(FEATURES),
        "action_dim": ACTION_DIM,
        "horizon": params.policy.horizon,
        "noise_scale": params.policy.noise_scale,
        "instructions": tuple(spec.instruction for spec in TASKS.values()),
    }
    return preset(params.policy.preset, policy, **learner)


def replay_for(config: AgentConfig) -> Replay:
    """An empty replay with the options of the learner's configuration."""
    c = config.learner
    return Replay(
        config.policy.instructions,
        config.policy.horizon,
        c.gamma,
        time_limit=c.time_limit,
        takeover=c.takeover,
        cloned=c.cloned,
    )


def n_step(task: str, config: LearnerConfig) -> int:
    """Chunks in the TD window of a task (eq. 19)."""
    return config.n_step_short if TASKS[task].horizon == "short" else config.n_step_long


def counted(episodes: Iterable[Episode], advance: Callable[..., None]) -> Iterator[Episode]:
    """Pass episodes on, advancing a progress bar for each."""
    for episode in episodes:
        advance(1, f"{episode.task} {episode.outcome}")
        yield episode


def fresh_folder(out: Path) -> Path:
    """An empty folder beside `out`, for `put_in_place` when all is there: a stage that fails leaves `out`."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def put_in_place(part: Path, out: Path) -> None:
    """Rename a whole folder to `out`. The one before is deleted last; a crash between leaves it as `out`.old."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    part.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def read_refused() -> list[dict[str, Any]]:
    """The episodes that stage `validate` refused, with their reasons.

    Raises:
        CorruptDataError: its file is missing or damaged.
    """
    path = QUARANTINE / "quarantine.json"
    try:
        refused = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(refused, list) or not all(isinstance(row["reasons"], list) for row in refused):
            raise ValueError("no list of refused episodes")
        if not all(isinstance(row["episode_id"], str) for row in refused):
            raise ValueError("an episode without id")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CorruptDataError(f"{path} cannot be read ({error})", "write it again: `dvc repro -f validate`") from error
    return refused


def write_metrics(name: str, metrics: Mapping[str, Any]) -> None:
    """`metrics/<name>.json`, for `dvc metrics show`."""
    path = Path("metrics") / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_plot(name: str, rows: Sequence[Mapping[str, float]]) -> None:
    """`plots/<name>.csv`, for `dvc plots show`; also the report's source."""
    path = Path("plots") / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_plot(name: str) -> list[dict[str, float]]:
    """The rows of `write_plot`."""
    with (Path("plots") / f"{name}.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
