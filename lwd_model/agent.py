"""The agent: Algorithm 2 of the paper, one batch at a time.

An update has two halves that share nothing but the batch: value learning with cloning (DIVL, eq. 12-21, and the
reference) and policy extraction (QAM, eq. 9, 10). With `parallel` they run in two threads of one core each, which
uses two cores better than two threads inside products of 64 rows. Either way the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ConfigError
from lwd_model.chunks import Batch
from lwd_model.config import AgentConfig
from lwd_model.divl import critic_loss, expectile_loss, scalar_td_target, td_target, value_loss
from lwd_model.flow import Velocity, euler, flow_matching_loss
from lwd_model.networks import Critic, FlatNetwork, FlowPolicy, Value, Weights
from lwd_model.normaliser import CLIP, Normaliser
from lwd_model.qam import qam_loss
from lwd_model.ranks import Ranks
from lwd_model.schedule import learning_rate
from lwd_model.support import Support

Metrics = dict[str, Tensor]


class LWDAgent(nn.Module):
    """Policy, reference, critic and value, their targets and their optimisers.

    Attributes:
        policy: f_theta. deployed: its EMA, what robots run.
        clone: the flow cloned on the replay (`ema_bc`). reference: f_beta, the clone's EMA or the frozen SFT policy.
        critic, critic_target, value, value_target: Q_phi, V_psi and their EMAs.
        counters: updates done by stage, `sft` and `rl`.

    Args:
        config: see `AgentConfig`.
        normaliser: statistics of the observations.
        dtype: of the trunks' products, `precision.compute_dtype`.
        seed: of the initial weights.
        parallel: run the two halves of an update in two threads.
        ranks: who learns the same agent together. Each brings its part of the batch; noise is drawn for the whole batch
            and gradients are averaged, so that every rank makes the update that one alone would make.
    """

    obs_mean: Tensor
    obs_std: Tensor

    def __init__(
        self,
        config: AgentConfig,
        normaliser: Normaliser,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        parallel: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
        if normaliser.mean.shape != (config.policy.obs_dim,):
            raise ConfigError(
                f"the normaliser has {normaliser.mean.shape[0]} entries, the policy obs_dim={config.policy.obs_dim}",
                "fit the normaliser on this embodiment's data",
            )
        self.config, self.dtype, self.parallel = config, dtype, parallel
        self.normaliser = normaliser
        self.register_buffer("obs_mean", torch.from_numpy(normaliser.mean.copy()))
        self.register_buffer("obs_std", torch.from_numpy(normaliser.std.copy()))
        generator = torch.Generator().manual_seed(seed)
        c = config
        self.support = Support(c.critic.v_min, c.critic.v_max, c.critic.atoms)
        self.policy = FlowPolicy(c.policy, generator)
        self.deployed, self.clone, self.reference = (FlowPolicy(c.policy) for _ in range(3))
        self.critic, self.critic_target = Critic(c.policy, c.critic, generator), Critic(c.policy, c.critic)
        outputs = c.critic.atoms if c.learner.value_kind == "distributional" else 1
        self.value, self.value_target = (
            Value(c.policy, c.critic, outputs, generator),
            Value(c.policy, c.critic, outputs),
        )
        self.critic_target.become(self.critic)
        self.value_target.become(self.value)
        for follower in (self.deployed, self.clone, self.reference):
            follower.become(self.policy)
        for frozen in (self.deployed, self.reference, self.critic_target, self.value_target):
            frozen.requires_grad_(False)
        self.counters = {"sft": 0, "rl": 0}
        self.reset_optimisers()

    def reset_optimisers(self) -> None:
        """New optimisers, for example after the networks moved to another device."""
        c = self.config.learner
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            name: torch.optim.AdamW([network.flat], lr=rate, weight_decay=decay, fused=True)
            for name, network, rate, decay in (
                ("policy", self.policy, c.policy_lr, c.weight_decay),
                ("clone", self.clone, c.policy_lr, c.weight_decay),
                ("critic", self.critic, c.critic_lr, 0.0),
                ("value", self.value, c.critic_lr, 0.0),
            )
        }
        self._pool: ThreadPoolExecutor | None = None

    def start_rl(self) -> None:
        """After SFT: the deployed policy becomes f_theta, f_beta and the clone; policy optimisers start afresh."""
        for network in (self.policy, self.clone, self.reference):
            network.become(self.deployed)
        for name in ("policy", "clone"):
            self.optimisers[name].state.clear()

    def normalise(self, obs: Tensor) -> Tensor:
        """(B, D) raw -> (B, D) standardised, as `Normaliser`."""
        return ((obs - self.obs_mean) / self.obs_std).clamp(-CLIP, CLIP)

    # --- supervised fine-tuning -----------------------------------------------------------------------------------

    def sft_update(self, batch: Batch, generator: torch.Generator, *, weight: Tensor | None = None) -> Metrics:
        """One step of flow matching on the policy (eq. 34) and of its EMA.

        Args:
            batch: samples to imitate.
            generator: CPU generator of noise and flow time.
            weight: (B,) weight of each sample; None is all 1 (HG-DAgger passes `batch.clone_weight`).
        """
        noise, w = self._flow_noise(batch.actions, generator)
        p = self.policy.weights(self.dtype)
        loss = self._flow_loss(self.policy, p, self.normalise(batch.obs), batch, weight, noise, w)
        norm = self._step("policy", self.policy, p, loss, self.counters["sft"])
        self.deployed.follow(self.policy, self._warm(self.config.learner.deploy_ema, self.counters["sft"]))
        self.counters["sft"] += 1
        return {"sft/loss": loss.detach(), "gradient/policy": norm}

    # --- reinforcement learning -----------------------------------------------------------------------------------

    def update(self, batch: Batch, generator: torch.Generator) -> Metrics:
        """One update of DIVL and QAM (Algorithm 2), and of the cloned reference.

        Args:
            batch: this rank's B samples; QAM takes its share of `policy_batch` of them, evenly spread (a mixed batch
                stays mixed).
            generator: CPU generator of all noise.

        Returns:
            0-d tensors by namespaced name; `.item()` them as rarely as possible.
        """
        c = self.config.learner
        obs = self.normalise(batch.obs)
        clone_noise = self._flow_noise(batch.actions, generator)
        states = c.policy_batch // self.ranks.world
        rows = slice(0, (len(batch) // states) * states or None, max(1, len(batch) // states))
        few, few_obs = batch[rows], obs[rows]
        noise = self._path_noise(few.actions, generator)
        steps_seed = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=generator)))

        learn_policy = self.counters["rl"] >= c.critic_warmup
        if self.parallel and learn_policy:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="qam")
            other = self._pool.submit(self._qam, few, few_obs, noise, steps_seed)
            metrics = self._divl(batch, obs, *clone_noise)
            metrics |= other.result()
        else:
            metrics = self._divl(batch, obs, *clone_noise)
            if learn_policy:
                metrics |= self._qam(few, few_obs, noise, steps_seed)

        # Only now, with both halves done: QAM read these networks.
        self.critic_target.follow(self.critic, c.ema)  # Algorithm 2, line 4
        self.value_target.follow(self.value, c.ema)  # appendix B2
        if c.reference == "ema_bc":
            self.reference.follow(self.clone, c.ema)
        if learn_policy:
            self.deployed.follow(self.policy, c.deploy_ema)
        self.counters["rl"] += 1
        return metrics

    def _divl(self, batch: Batch, obs: Tensor, noise: Tensor, w: Tensor) -> Metrics:
        """Value, critic and clone on the whole batch (Algorithm 2, lines 1-3)."""
        c, step = self.config.learner, self.counters["rl"]
        critic_t, value_t = self.critic_target.weights(self.dtype), self.value_target.weights(self.dtype)
        clip = (0.0, 1.0) if c.clip_targets else None
        with torch.no_grad():
            cache = self.critic_target.prefix(obs, batch.task, critic_t)
            target_q = self.critic_target.q(cache, batch.actions, batch.mask, critic_t).amin(0)
            next_out = self.value_target.logits(self.normalise(batch.next_obs), batch.task, value_t)

        value = self.value.weights(self.dtype)
        out = self.value.logits(obs, batch.task, value)
        metrics: Metrics = {}
        if c.value_kind == "distributional":
            loss_v = value_loss(out, target_q, self.support)  # eq. 12, 21
            target = td_target(
                batch.reward, batch.discount, next_out, self.support, tau_base=c.tau_base,
                alpha=c.alpha if c.tau_kind == "adaptive" else 0.0, tau_min=c.tau_min, tau_max=c.tau_max,
                interpolate=c.interpolate, clip=clip,
            )  # eq. 18, 19  # fmt: skip
            y = target.y
            metrics |= {"value/tau": target.tau.mean(), "value/entropy": target.entropy.mean()}
            metrics["value/bootstrap"] = target.bootstrap.mean()
        else:
            loss_v = expectile_loss(out.squeeze(-1), target_q, c.tau_base)  # eq. 3, 4
            y = scalar_td_target(batch.reward, batch.discount, next_out.squeeze(-1), clip=clip)  # eq. 5
        metrics["gradient/value"] = self._step("value", self.value, value, loss_v, step)

        critic = self.critic.weights(self.dtype)
        q = self.critic.q(self.critic.prefix(obs, batch.task, critic), batch.actions, batch.mask, critic)
        loss_q = critic_loss(q, y)  # eq. 15
        metrics["gradient/critic"] = self._step("critic", self.critic, critic, loss_q, step)
        metrics |= {
            "divl/value_loss": loss_v.detach(),
            "divl/critic_loss": loss_q.detach(),
            "divl/q": q.detach().mean(),
            "divl/q_gap": (q.detach()[0] - q.detach()[-1]).abs().mean(),
            "divl/target": y.mean(),
        }
        if c.reference == "ema_bc":
            weight = None if c.cloned == "all" else batch.clone_weight
            clone = self.clone.weights(self.dtype)
            loss = self._flow_loss(self.clone, clone, obs, batch, weight, noise, w)
            metrics["gradient/clone"] = self._step("clone", self.clone, clone, loss, step)
            metrics["clone/loss"] = loss.detach()
        return metrics

    def _qam(self, batch: Batch, obs: Tensor, noise: Tensor, generator: torch.Generator) -> Metrics:
        """Policy extraction on the first states (Algorithm 2, lines 5-8)."""
        c, policy, reference = self.config.learner, self.policy, self.reference
        mine, base, judge = (
            policy.weights(self.dtype),
            reference.weights(self.dtype),
            self.critic_target.weights(self.dtype),
        )
        my_cache = policy.prefix(obs, batch.task, mine)
        with torch.no_grad():
            base_cache = reference.prefix(obs, batch.task, base)
            judge_cache = self.critic_target.prefix(obs, batch.task, judge).repeat(1, c.samples, 1)
        mask = batch.mask.repeat(c.samples, 1)

        def q(actions: Tensor) -> Tensor:
            heads = self.critic_target.q(judge_cache, actions, mask, judge)
            return heads.mean(0) if c.critic_grad == "mean" else heads.amin(0)

        result = qam_loss(
            lambda tiles: lambda x, w: policy.velocity(my_cache, x, w, mine),
            lambda tiles: lambda x, w: reference.frozen_velocity(base_cache, x, w, base),
            q, noise, inv_temp=c.inv_temp, sigma=c.sigma, rollout=c.rollout, endpoint=c.endpoint, samples=c.samples,
            step_subset=c.step_subset, generator=generator, mask=batch.mask,
            replay_actions=batch.actions.repeat(c.samples, 1, 1) if c.endpoint == "replay_grad" else None,
        )  # fmt: skip
        norm = self._step("policy", policy, mine, result.loss, self.counters["rl"])
        return {"qam/loss": result.loss.detach(), "gradient/policy": norm} | {
            f"qam/{name}": value for name, value in result.metrics.items()
        }

    # --- shared parts ---------------------------------------------------------------------------------------------

    def _flow_noise(self, actions: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise and flow times of this rank's samples, cut from those of all ranks' samples."""
        count = len(actions) * self.ranks.world
        noise = torch.randn(count, *actions.shape[1:], generator=generator)
        times = torch.rand(count, generator=generator)
        mine = self.ranks.part(count)
        return noise[mine].to(actions.device), times[mine].to(actions.device)

    def _path_noise(self, actions: Tensor, generator: torch.Generator) -> Tensor:
        """(N, M·B, H, A) noise of QAM's trajectories, tile-major, cut likewise."""
        steps, samples, count = self.config.policy.flow_steps, self.config.learner.samples, len(actions)
        count *= self.ranks.world
        noise = torch.randn(steps, samples, count, *actions.shape[1:], generator=generator)
        return noise[:, :, self.ranks.part(count)].flatten(1, 2).to(actions.device)

    def _flow_loss(
        self,
        network: FlowPolicy,
        p: Weights,
        obs: Tensor,
        batch: Batch,
        weight: Tensor | None,
        noise: Tensor,
        w: Tensor,
    ) -> Tensor:
        cache = network.prefix(obs, batch.task, p)
        return flow_matching_loss(
            lambda x, t: network.velocity(cache, x, t, p),
            batch.actions,
            batch.mask,
            weight,
            noise,
            w,
            self.ranks.average,
        )

    def _step(self, name: str, network: FlatNetwork, weights: Weights, loss: Tensor, step: int) -> Tensor:
        """One optimiser step on one network, its gradient clipped to a norm; returns the norm before, 0-d."""
        c, optimiser, flat = self.config.learner, self.optimisers[name], network.flat
        gradient = self.ranks.average(network.collect(loss, weights))
        norm = torch.linalg.vector_norm(gradient)
        if c.grad_clip:
            gradient.mul_((c.grad_clip / norm.clamp_min(1e-12)).clamp_max(1.0))
        flat.grad = gradient
        base = c.policy_lr if name in ("policy", "clone") else c.critic_lr
        optimiser.param_groups[0]["lr"] = learning_rate(base, step, c)
        optimiser.step()
        flat.grad = None
        return norm

    @staticmethod
    def _warm(rate: float, step: int) -> float:
        """An EMA's rate that starts as a running mean, so that the initial weights are forgotten."""
        return max(rate, 1.0 / (1.0 + step))

    # --- acting and reading ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Tensor, task: Tensor, noise: Tensor, which: str = "deployed") -> Tensor:
        """Action chunks from noise (B, H, A), clipped to [-1, 1]; float32."""
        network: FlowPolicy = getattr(self, which)
        p: Weights = network.weights()
        cache = network.prefix(self.normalise(obs), task, p)
        velocity: Velocity = lambda x, w: network.velocity(cache, x, w, p)  # noqa: E731
        return euler(velocity, noise, self.config.policy.flow_steps).clamp(-1.0, 1.0)

    def networks(self) -> Iterable[tuple[str, FlatNetwork]]:
        """All networks by name."""
        return ((name, module) for name, module in self.named_children() if isinstance(module, FlatNetwork))

    def learner_state(self) -> dict[str, Any]:
        """All that `update` depends on besides the batch and the generator; tensors and plain values only."""
        return {
            "networks": {name: network.flat.detach() for name, network in self.networks()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "normaliser": {"mean": self.obs_mean, "std": self.obs_std},
            "counters": dict(self.counters),
        }

    def load_learner_state(self, state: dict[str, Any]) -> None:
        """Inverse of `learner_state`, bit for bit."""
        with torch.no_grad():
            for name, network in self.networks():
                network.flat.copy_(state["networks"][name])
            self.obs_mean.copy_(state["normaliser"]["mean"])
            self.obs_std.copy_(state["normaliser"]["std"])
        self.normaliser = Normaliser(self.obs_mean.cpu().numpy().copy(), self.obs_std.cpu().numpy().copy())
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.counters = {name: int(count) for name, count in state["counters"].items()}
