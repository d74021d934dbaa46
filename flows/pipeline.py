"""The stages of `dvc.yaml`, run through DVC's own API: `dvc repro` and the Prefect flow cannot drift apart."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from infra.errors import ConfigError, LwdError


def stages(until: str | None = None) -> list[str]:
    """Names of the pipeline's stages, in the order in which they depend on each other.

    Args:
        until: the last one wanted; all of them by default.

    Raises:
        ConfigError: the current folder is no DVC repository, its `dvc.yaml` is not valid, or it has no stage `until`.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            graph = repo.index.graph
            order = networkx.lexicographical_topological_sort(graph.reverse(), key=lambda stage: stage.addressing)
            names = [stage.addressing for stage in order]
    except DvcException as error:
        fix = "run from the root of a git clone (`git init` makes one of an unpacked archive); `dvc repro` says more"
        raise ConfigError(f"dvc.yaml: {error}", fix) from error
    if until is None:
        return names
    if until not in names:
        raise ConfigError(f"dvc.yaml has no stage {until!r}", f"name one of: {', '.join(names)}")
    return names[: names.index(until) + 1]


def run(stage: str) -> bool:
    """Reproduce one stage; True where it ran, False where its inputs had not changed.

    Raises:
        LwdError: the stage failed, or another DVC process holds the lock.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # The stage's command is `python -m …`: it must be this environment's Python.
    here = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != here:
        os.environ["PATH"] = here + os.pathsep + os.environ["PATH"]
    logging.getLogger("dvc").setLevel(logging.ERROR)  # the flow says what runs; DVC would say it twice
    try:
        with Repo() as repo:
            return bool(repo.reproduce(targets=[stage], single_item=True))
    except DvcException as error:
        cause = error.__cause__ or error
        raise LwdError(
            f"stage {stage!r} failed: {cause}",
            f"its own message is above; `dvc repro {stage}` runs it again, and a lock means that another DVC runs",
        ) from error
