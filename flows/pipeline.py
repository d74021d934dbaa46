"""The stages of `dvc.yaml`, run through DVC's own API: `dvc repro` and the Prefect flow cannot drift apart."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from infra import interrupts, lifeline
from infra.errors import ConfigError, LwdError
from infra.exclusive import exclusive

_STOP_S = 10.0  # for a stage to end, before SIGKILL
_SIGNALS = {130, 143, 129, -2, -15, -1}  # exit codes of a stage that was told to stop
_LOCKS = Path(".dvc/tmp/lwd")


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


@contextlib.contextmanager
def alone(name: str) -> Iterator[int | None]:
    """Hold the lock `name` of this folder's pipeline; the descriptor, or None where there is no pipeline.

    Raises:
        LeaseLostError: another process has it; it is named.
    """
    if not Path(".dvc").is_dir():
        yield None
        return
    with exclusive(_LOCKS / f"{name}.lock", f"{name} of the pipeline in {Path.cwd()}") as handle:
        yield handle


def run(stage: str) -> bool:
    """Reproduce one stage; True where it ran, False where its inputs had not changed.

    DVC works in a thread of its own: in the main one it would ignore Ctrl-C while a stage runs.

    Raises:
        LwdError: the stage failed, or another DVC process holds the lock.
        Stopped: somebody asked this command, or the stage, to stop; the stage has ended.
    """
    interrupts.check()
    # The stage's command is `python -m …`: it must be this environment's Python.
    here = str(Path(sys.executable).parent)
    if os.environ["PATH"].split(os.pathsep)[0] != here:
        os.environ["PATH"] = here + os.pathsep + os.environ["PATH"]
    logging.getLogger("dvc").setLevel(logging.ERROR)  # the flow says what runs; DVC would say it twice
    work = _Reproduction(stage)
    with contextlib.ExitStack() as own:
        if lifeline.MARK not in os.environ:  # a flow that a Prefect worker runs, without a command of ours
            own.enter_context(lifeline.lifeline())
        work.start()
        try:
            while work.is_alive():
                work.join(0.2)
        except BaseException:
            work.end()
            raise
    interrupts.check()
    return work.outcome()


class _Reproduction(threading.Thread):
    """One `dvc repro` of one stage."""

    def __init__(self, stage: str) -> None:
        super().__init__(name=f"dvc-{stage}", daemon=True)
        self._stage = stage
        self._ran = False
        self._error: BaseException | None = None

    def run(self) -> None:
        from dvc.repo import Repo

        # What DVC starts inherits this: the terminal's Ctrl-C is not for the stage, which `end` tells in its turn.
        try:
            with interrupts.held(), Repo() as repo:
                self._ran = bool(repo.reproduce(targets=[self._stage], single_item=True))
        except BaseException as error:
            self._error = error

    def end(self) -> None:
        """End the stage's processes, if need be by SIGKILL, and wait for DVC to notice."""
        lifeline.end_all(chosen=lambda env: env.get("DVC_STAGE") == self._stage, patience_s=_STOP_S)
        self.join(_STOP_S)

    def outcome(self) -> bool:
        from dvc.exceptions import DvcException
        from dvc.stage.exceptions import StageCmdFailedError

        error = self._error
        if error is None:
            return self._ran
        if not isinstance(error, DvcException):
            raise error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, StageCmdFailedError) and _status(cause) in _SIGNALS:
                raise interrupts.Stopped(abs(_status(cause)) % 128)
            cause = cause.__cause__
        raise LwdError(
            f"stage {self._stage!r} failed: {error.__cause__ or error}",
            f"its own message is above; `dvc repro {self._stage}` runs it again; a lock means that another DVC runs",
        ) from error


def _status(error: BaseException) -> int:
    """Exit code in DVC's message, which alone has it: `failed to run: …, exited with 130`."""
    last = str(error).rsplit(" ", 1)[-1]
    return int(last) if last.lstrip("-").isdigit() else 0
