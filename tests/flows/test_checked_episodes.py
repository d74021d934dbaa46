"""What the contract refuses is not learned from, named and counted; a stage that fails leaves the models before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.stages.checked import checked_episodes
from flows.stages.common import fresh_folder, put_in_place
from infra.episode import Episode
from infra.errors import ConfigError
from infra.fleet.sources import demonstrations as scripted
from lwd_model.shards import write_buffer


@pytest.fixture(scope="module")
def demonstrations() -> list[Episode]:
    return list(scripted(("S1",), 3, 7, noise=0.05, workers=1))


def _with(field: str, value: float) -> Callable[[Episode], Episode]:
    def change(episode: Episode) -> Episode:
        values = getattr(episode, field).copy()
        values.flat[1] = value
        return dataclasses.replace(episode, **{field: values})

    return change


KINDS = {
    "an action beyond its limits": _with("actions", 57.3),
    "an action that is not a number": _with("actions", np.nan),
    "an observation that is not finite": _with("observations", np.inf),
    "a reward in the middle": _with("rewards", 0.5),
    "an operator in a demonstration": _with("intervention", True),
    "narrow observations": lambda e: dataclasses.replace(e, observations=np.ascontiguousarray(e.observations[:, :-1])),
    "an unknown task": lambda e: dataclasses.replace(e, task="S99"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_demonstration_is_not_learned_from(tmp_path: Path, kind: str, demonstrations: list[Episode]) -> None:
    odd, *rest = demonstrations
    write_buffer([KINDS[kind](odd), *rest], tmp_path / "demos")
    told: list[str] = []
    accepted, refused = checked_episodes(tmp_path / "demos", 0.5, lambda e, v: told.append(e.episode_id))
    assert {e.episode_id for e in accepted} == {e.episode_id for e in rest}
    assert refused == 1 and told == [odd.episode_id]
    with pytest.raises(ConfigError, match="refuses 1 of 3 episodes"):
        checked_episodes(tmp_path / "demos", 0.1)


def test_the_folder_before_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "sft"
    for content in ("old", "new"):
        part = fresh_folder(out)
        (part / "weights").write_text(content)
        assert not out.exists() or (out / "weights").read_text() == "old"
        put_in_place(part, out)
        assert (out / "weights").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
