"""The stages' only way to episodes that are learned from: what the contract refuses is named and left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_contracts.checks import Violation, check_episode
from data_contracts.contract import load_contract
from flows.console import console
from infra.episode import Episode
from infra.errors import ConfigError
from lwd_model.shards import read_buffer


def checked_episodes(
    folder: Path, refused_max: float, on_refusal: Callable[[Episode, Violation], None] | None = None
) -> tuple[list[Episode], int]:
    """A folder's episodes that the contract accepts, and how many it refuses.

    Args:
        folder: of shards (`write_buffer`).
        refused_max: share of them that may be refused.
        on_refusal: told of each refused episode and the first blocking rule that it breaks; prints it by default.

    Raises:
        CorruptDataError: the index or a shard is missing or changed; the message names the file.
        ConfigError: more than that share is refused, or nothing is left.
    """
    contract, accepted, refused, reason = load_contract("episode"), [], 0, ""
    for episode in read_buffer(folder):
        first = next((v for v in check_episode(contract, episode) if v.severity == "block"), None)
        if first is None:
            accepted.append(episode)
            continue
        refused, reason = refused + 1, first.message
        (on_refusal or _say)(episode, first)
    total = len(accepted) + refused
    if not accepted or refused > refused_max * total:
        raise ConfigError(
            f"{folder}: the contract refuses {refused} of {total} episodes"
            + (f", the last because {reason}" if reason else ""),
            f"correct the data or the contract; up to {refused_max:.0%} may be refused (`refused_max` in params.yaml)",
        )
    return accepted, refused


def _say(episode: Episode, first: Violation) -> None:
    console.print(
        f"  not learned from: {str(episode.episode_id)[:8]} ({str(episode.source)[:20]} {str(episode.task)[:20]}): "
        f"{first.message[:200]}",
        markup=False,
    )
