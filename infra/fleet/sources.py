"""The offline buffer's three sources, collected by worker processes.

Demonstrations are the expert's successes; rollouts are what historical policies really do, failures included; play is
an operator who lets the policy run off the road, perturbed or not, and recovers from there.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from infra import interrupts
from infra.edge.shield import Limits
from infra.edge.watchdog import ActionPolicy
from infra.episode import Episode, Source, decode, encode
from infra.errors import ConfigError, LwdError, UnavailableError
from infra.fleet.operator import ExpertOperator, Operator, PlayOperator
from infra.fleet.rollout import Job, iterate_jobs
from infra.fleet.tasks import TASKS, task
from infra.process import die_with_parent

DEMO_NOISE = 0.15
_ATTEMPTS = 20
_STREAMS = ("demo", "rollout", "play", "evaluation", "online")


def job_list(tasks: Sequence[str], per_task: int, seed: int, stream: str) -> list[Job]:
    """`per_task` jobs for each task, tasks interleaved so that a run cut short is balanced.

    Args:
        stream: keeps the seeds of different uses apart: `demo`, `rollout`, `play`, `evaluation`, `online`. The i-th job
            of a task depends on (seed, stream, task, i) alone: evaluations of two policies are paired by it.

    Raises:
        ConfigError: unknown task or stream.
    """
    if stream not in _STREAMS:
        raise ConfigError(f"unknown stream of jobs {stream!r}", f"use one of {', '.join(_STREAMS)}")
    for key in tasks:
        task(key)
    keys = list(TASKS)
    return [
        Job(key, _mix(seed, _STREAMS.index(stream), keys.index(key), i), stream)
        for i in range(per_task)
        for key in tasks
    ]


def demonstrations(
    tasks: Sequence[str], per_task: int, seed: int, *, noise: float = DEMO_NOISE, workers: int = 1, envs: int = 4
) -> Iterator[Episode]:
    """Yield `per_task` successful demonstrations a task by the expert with AR(1) noise.

    A failed attempt is not kept: it is made again from another start, drawn from the first one's seed. That makes the
    start distribution that of the expert's successes. Demonstrations carry no intervention flag.

    Raises:
        ConfigError: unknown task; the expert fails twenty times in a row at this noise.
    """
    yield from collect(
        job_list(tasks, per_task, seed, "demo"),
        None,
        source="demo",
        operator=functools.partial(ExpertOperator, noise),
        again=_demonstrate_again,
        workers=workers,
        envs=envs,
    )


def rollouts(
    policy: str | Path | ActionPolicy,
    tasks: Sequence[str],
    per_task: int,
    seed: int,
    *,
    execute: int | None = None,
    workers: int = 1,
    envs: int = 8,
) -> Iterator[Episode]:
    """Yield autonomous episodes of a historical policy, successes and failures, nobody taking over."""
    jobs = job_list(tasks, per_task, seed, "rollout")
    yield from collect(jobs, policy, source="rollout", execute=execute, workers=workers, envs=envs)


def play(
    policy: str | Path | ActionPolicy,
    tasks: Sequence[str],
    per_task: int,
    seed: int,
    *,
    perturbed: float = 0.5,
    perturbation: tuple[float, float] = (0.3, 1.0),
    takeover: tuple[float, float] = (0.25, 0.5),
    execute: int | None = None,
    workers: int = 1,
    envs: int = 8,
) -> Iterator[Episode]:
    """Yield play: the policy runs until it is off the road, then the operator recovers (flagged as intervention).

    Args:
        perturbed: share of the episodes whose policy is disturbed by AR(1) noise, of a standard deviation drawn
            uniformly from `perturbation`.
        takeover: the operator takes over after a share of the task's limit drawn uniformly from here.
    """
    jobs = []
    for job in job_list(tasks, per_task, seed, "play"):
        rng = np.random.default_rng([job.seed, 3])
        strength = float(rng.uniform(*perturbation)) if rng.uniform() < perturbed else 0.0
        jobs.append(replace(job, perturbation=strength))
    operator = functools.partial(PlayOperator, *takeover)
    yield from collect(jobs, policy, source="play", operator=operator, execute=execute, workers=workers, envs=envs)


def collect(
    jobs: Sequence[Job],
    policy: str | Path | ActionPolicy | None,
    *,
    source: Source,
    execute: int | None = None,
    operator: Callable[[], Operator] | None = None,
    again: Callable[[Job, Episode], Job | None] | None = None,
    limits: Limits | None = None,
    workers: int = 1,
    envs: int = 8,
) -> Iterator[Episode]:
    """Yield the episodes of `jobs` as they end, from `workers` processes of `envs` scenes each (0: in this process).

    Closing the generator stops the workers. The episodes do not depend on `workers` or `envs`; their order does.

    Args:
        policy: a bundle's folder; with `workers=0` also a loaded policy.
        operator, again, limits: as in `iterate_jobs`; picklable when there are workers.

    Raises:
        ConfigError: see `iterate_jobs`; a loaded policy was given to worker processes.
        UnavailableError: a worker died.
    """
    options: dict[str, Any] = {
        "source": source,
        "execute": execute,
        "operator": operator,
        "again": again,
        "limits": limits,
        "envs": envs,
    }
    if workers == 0:
        yield from (episode for _, episode in iterate_jobs(_load(policy), jobs, **options))
        return
    if policy is not None and not isinstance(policy, (str, Path)):
        raise ConfigError("worker processes load policies themselves", "give the bundle's folder, or workers=0")
    context = multiprocessing.get_context("spawn")
    try:
        done: Any = context.Queue()
    except OSError as error:  # no /dev/shm, or one that is full or read-only: no semaphores
        logging.getLogger(__name__).warning("no worker processes (%s): all scenes run in this one", error)
        yield from collect(jobs, policy, workers=0, **options)
        return
    workers = max(1, min(workers, len(jobs)))
    bundle = None if policy is None else str(policy)
    processes = [
        context.Process(
            target=_work, args=(_Work(list(jobs[i::workers]), bundle, options, os.getpid()), done), daemon=True
        )
        for i in range(workers)
    ]
    try:
        with interrupts.held():
            for process in processes:
                process.start()
        for _ in range(len(jobs)):
            yield decode(_receive(done, processes))
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
        done.close()


@dataclass(frozen=True)
class _Work:
    """What one worker does; the same share of every task goes to each."""

    jobs: list[Job]
    bundle: str | None
    options: dict[str, Any]
    parent: int


def _work(work: _Work, done: Any) -> None:
    """A worker process: encoded episodes, or the error that stopped it, go to `done`."""
    die_with_parent(work.parent, signal.SIGKILL)  # one that waits to hand in its episodes would not look
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its workers
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

    def orphaned() -> bool:
        return os.getppid() != work.parent

    try:
        for _, episode in iterate_jobs(_load(work.bundle), work.jobs, stop=orphaned, **work.options):
            done.put(encode(episode))
    except LwdError as error:
        done.put(error)


def _receive(done: Any, processes: Sequence[BaseProcess]) -> bytes:
    while True:
        try:
            item = done.get(timeout=1.0)
        except queue.Empty:
            dead = [process for process in processes if process.exitcode not in (None, 0)]
            if dead:
                raise UnavailableError(
                    f"a collecting process ended with code {dead[0].exitcode}",
                    "see its error above; the episodes that it had finished were kept, collect the others again",
                ) from None
            continue
        if isinstance(item, LwdError):
            raise item
        return bytes(item)


def _load(policy: str | Path | ActionPolicy | None) -> ActionPolicy | None:
    if not isinstance(policy, (str, Path)):
        return policy
    from infra.edge.inference import load_policy  # numpy inference: the only part of the edge that is needed here

    return load_policy(Path(policy))


def _mix(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _demonstrate_again(job: Job, episode: Episode) -> Job | None:
    """Another start after a failed demonstration; None keeps a success."""
    if episode.success:
        return None
    attempt = int(job.kind.partition("#")[2] or 0) + 1
    if attempt >= _ATTEMPTS:
        raise ConfigError(
            f"the expert failed {_ATTEMPTS} demonstrations of {job.task} in a row", "lower the demonstrations' noise"
        )
    return replace(job, seed=_mix(job.seed, attempt), kind=f"demo#{attempt}")
