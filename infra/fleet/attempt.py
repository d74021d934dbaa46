"""One episode of a robot: observe, plan, act through the shield, record; and what ends it safely.

Control runs in the caller's thread and never waits for a policy longer than the watchdog allows. A policy's fault ends
the episode as a failure after one more step, the hold. What the robot's own parts raise goes to the caller, who
discards the attempt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from infra.edge.client import EdgeClient
from infra.edge.clock import Clock
from infra.edge.framelog import Frame
from infra.edge.shield import Floats, PolicyFaultError, Shield
from infra.edge.watchdog import Inference
from infra.episode import Outcome
from infra.errors import CorruptDataError
from infra.fleet.operator import Operator
from infra.fleet.rollout import Job, generator, shield_counts
from infra.fleet.scene import SceneEnv

_LEAST_PERIOD = 0.6  # of the control period: a late step is caught up by steps no shorter than this


@dataclass(frozen=True)
class Ended:
    """How an attempt ended.

    Attributes:
        episode_id, outcome, steps: of the closed episode.
        takeover: the step from which an operator acted.
        safety: what the shield counted of the policy's actions, by kind.
        fault: what the policy did, if that ended the episode.
    """

    episode_id: str
    outcome: Outcome
    steps: int
    takeover: int | None
    safety: Mapping[str, int]
    fault: PolicyFaultError | None


@dataclass
class Attempt:
    """Runs episodes of one scene; the fields are what stays the same from one to the next.

    Attributes:
        client, env, operator, shield: the robot's parts.
        period_s: of a control step, seconds of the world. pace: seconds of the world in one of the wall clock; 0 for
            a simulation as fast as the machine can, whose time is the simulator's own.
        patience: the deadlines of the limits are multiplied by it: 1 on a robot; more where the world waits for its
            policy, as a simulator does that shares a machine.
    """

    client: EdgeClient
    env: SceneEnv
    operator: Operator | None
    shield: Shield
    period_s: float
    pace: float = 0.0
    patience: float = 1.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(time.monotonic, self.pace) if self.pace else Clock(lambda: self.env.time)

    def run(self, inference: Inference, job: Job, execute: int | None, extra: Mapping[str, Any]) -> Ended:
        """One episode, recorded and closed.

        Args:
            inference: of the policy that acts; free.
            job: the task and the seed.
            execute: actions of a chunk executed before replanning; all of them without it.
            extra: for the episode's record.

        Raises:
            CorruptDataError: an observation is not one of finite numbers. Whatever the scene, the operator or the
                client raise. The episode is then still open.
        """
        env, operator, shield, clock = self.env, self.operator, self.shield, self.clock
        observation = _sound(env.reset(seed=job.seed, options={"task": job.task})[0])
        rng = generator(job)
        if operator is not None:
            operator.reset(env, np.random.default_rng([job.seed, 2]))
        policy = inference.policy
        shield.reset()
        episode_id = self.client.begin(job.task, env.instruction, source="online", policy_version=policy.version)
        planner = _Planner(inference, shield, clock, execute or policy.horizon, self._deadline(), rng)
        outcome: Outcome | None = None
        steps, takeover, fault = 0, None, None
        clock.start()
        due = clock.now()
        while outcome is None:
            self._wait_until(due)
            due = max(due + self.period_s, clock.now() + _LEAST_PERIOD * self.period_s)
            at = clock.stamp()
            if takeover is None and operator is not None and operator.observe(env, steps):
                takeover = steps
            position = env.effector
            if takeover is not None and operator is not None:
                action = shield.apply(operator.act(env), position=position, operator=True)
            else:
                try:
                    action = planner.action(observation, env.instruction, position, self.patience)
                except PolicyFaultError as error:
                    fault, action = error, shield.hold("fault", position=position)
            after, reward, terminated, truncated, info = env.step(action)
            after = _sound(after)
            self.client.record(Frame(observation, action, reward, takeover is not None, at))
            observation, steps = after, steps + 1
            if terminated:
                outcome = "success" if info["success"] else "failure"
            elif truncated:
                outcome = "time_limit"
            elif fault is not None:
                outcome = "failure"
        self._wait_until(due)  # the last action acts for its whole period too, before what it led to is stamped
        note = dict(extra)
        if takeover is not None:
            note["takeover_step"] = takeover
        counts = shield_counts(shield)
        note |= counts
        if fault is not None:
            note["policy_fault"] = fault.problem[:300]
        self.client.close(observation, clock.stamp(), outcome, env.substep_scores, note)
        return Ended(episode_id, outcome, steps, takeover, counts.get("safety", {}), fault)

    def _wait_until(self, due: float) -> None:
        """Until the world's clock shows `due`; a simulation as fast as the machine can does not wait."""
        if self.pace:
            time.sleep(max(0.0, (due - self.clock.now()) / self.pace))

    def _deadline(self) -> float:
        """Seconds of the wall clock that an inference may take."""
        return self.period_s * self.patience / (self.pace or 1.0)


class _Planner:
    """Actions of one episode from chunks that are planned in time."""

    def __init__(
        self, inference: Inference, shield: Shield, clock: Clock, execute: int, deadline_s: float,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._inference, self._shield, self._clock = inference, shield, clock
        self._execute, self._deadline_s, self._rng = execute, deadline_s, rng
        self._chunk: Floats | None = None
        self._cursor, self._planned_at, self._late = 0, 0.0, 0

    def action(self, observation: Floats, instruction: str, position: Any, patience: float) -> Floats:
        """The next action to execute: of the chunk, of a new one, or the hold where that is late.

        Raises:
            PolicyFaultError: the policy gave what cannot be executed, or was late too often.
        """
        limits, shape = self._shield.limits, (self._inference.policy.horizon, self._shield.limits.action_dim)
        if self._chunk is None:
            if not self._inference.pending:
                self._planned_at = self._clock.now()
                self._inference.ask(observation, instruction, self._rng.standard_normal(shape, np.float32))
            found = self._inference.answer(self._deadline_s)
            if found is None:
                self._late += 1
                if self._late >= limits.late_events:
                    self._shield.counts["late"] += 1
                    raise PolicyFaultError(
                        f"inference took more than {self._deadline_s:.3g} s at {self._late} control steps",
                        "deploy a smaller policy, or a faster computer",
                    )
                return self._shield.hold("late", position=position)
            self._chunk, self._cursor = self._shield.plan(found[0], shape[0]), 0
        age = (self._clock.now() - self._planned_at) / patience
        action = self._shield.apply(self._chunk[self._cursor], position=position, age_s=age)
        self._cursor += 1
        too_old = limits.chunk_age_s is not None and age > limits.chunk_age_s
        if too_old or self._cursor >= min(self._execute, len(self._chunk)):
            self._chunk = None
        return action


def _sound(observation: Any) -> Floats:
    """The observation, if a policy may be asked with it: a sensor's fault is not the policy's."""
    found = np.array(observation, np.float32)  # a scene may fill the same array again
    if found.ndim != 1 or not np.isfinite(found).all():
        raise CorruptDataError(
            f"the observation {found.shape} is not one row of finite numbers", "look at the robot's sensors"
        )
    return found
