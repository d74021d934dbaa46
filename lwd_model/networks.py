"""The `state` preset's networks: flow policy, critic and value as residual LayerNorm MLPs.

Each network keeps its parameters in *one* flat float32 tensor and computes with views of it. One optimiser step, one
EMA, one cast to bfloat16 and one checkpoint entry then serve the whole network, which on a CPU saves more than any
fusion of the arithmetic. The trunk has no affine LayerNorm: the linear layer that follows holds the same functions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lwd_model.config import CriticConfig, PolicyConfig

Weights = dict[str, Tensor]
_ALIGN = 32  # elements; a tensor that begins within a cache line costs a tenth of its product


class FlatNetwork(nn.Module):
    """Parameters named and shaped by `shapes`, stored in the one tensor `flat`."""

    flat: nn.Parameter

    def __init__(self, shapes: dict[str, tuple[int, ...]], generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes.values()]
        self._split = [part for size in self._sizes for part in (size, -size % _ALIGN)]
        self.flat = nn.Parameter(torch.zeros(sum(self._split)))
        with torch.no_grad():
            for name, tensor in self._views(self.flat).items():
                if name.endswith("weight") and name != "head.weight":  # (…, out, in): LeCun normal; heads start at zero
                    tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
                elif name.endswith("embedding"):
                    tensor.normal_(0.0, 0.5, generator=generator)

    def weights(self, dtype: torch.dtype | None = None) -> Weights:
        """The parameters as leaf views, cast to `dtype` in one call; `collect` brings their gradients to `flat`.

        Heads (`head.*`) are always float32: outputs near 1 are worth more than bfloat16's three digits.
        """
        flat = self.flat.detach()
        views = self._views(flat)
        if dtype not in (None, flat.dtype):
            cast = self._views(flat.to(dtype))
            views = {name: views[name] if name.startswith("head.") else cast[name] for name in cast}
        if self.flat.requires_grad:
            for view in views.values():
                view.requires_grad_()
        return views

    def collect(self, loss: Tensor, p: Weights) -> Tensor:
        """Gradient of `loss` by `flat`, float32, through the weights `p` of this network."""
        gradient = torch.zeros_like(self.flat)
        parts = torch.autograd.grad(loss, list(p.values()))
        torch._foreach_copy_(list(self._views(gradient).values()), parts)
        return gradient

    def _views(self, flat: Tensor) -> Weights:
        parts = flat.split_with_sizes(self._split)[::2]
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def named_tensors(self) -> dict[str, Tensor]:
        """Detached copies by name, for export."""
        return {name: tensor.clone() for name, tensor in self._views(self.flat.detach()).items()}

    def load_named(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `named_tensors`; shapes must match."""
        with torch.no_grad():
            for name, tensor in self._views(self.flat).items():
                tensor.copy_(tensors[name])

    @torch.no_grad()
    def follow(self, online: FlatNetwork, rate: float) -> None:
        """self ← (1 - rate)·self + rate·online (appendix B2)."""
        self.flat.lerp_(online.flat, rate)

    @torch.no_grad()
    def become(self, other: FlatNetwork) -> None:
        """self ← other."""
        self.flat.copy_(other.flat)


def trunk_shapes(width: int, blocks: int, kind: str, out: int, heads: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of a trunk and its head; with `heads`, a leading dimension of that many independent copies."""
    lead = (heads,) if heads else ()
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(blocks):
        shapes[f"block{i}.in.weight"] = (*lead, width, width)
        shapes[f"block{i}.in.bias"] = (*lead, width)
        if kind == "residual":
            shapes[f"block{i}.out.weight"] = (*lead, width, width)
    shapes["head.weight"] = (*lead, out, width)
    shapes["head.bias"] = (*lead, out)
    return shapes


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (…, in) with weight (out, in); or all heads in one call, x (heads, B, in) with weight (heads, out, in)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def residual(h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """h + W x in one call; shapes as in `linear`."""
    return torch.addmm(h, x, weight.mT) if weight.ndim == 2 else torch.baddbmm(h, x, weight.mT)


def norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:])


def trunk(h: Tensor, p: Weights, blocks: int, kind: str) -> Tensor:
    """Embedded input (…, width) to output (…, out), float32."""
    for i in range(blocks):
        w_in, b_in = p[f"block{i}.in.weight"], p[f"block{i}.in.bias"]
        if kind == "residual":
            h = residual(h, F.silu(linear(norm(h), w_in, b_in)), p[f"block{i}.out.weight"])
        else:
            h = norm(F.silu(linear(F.silu(h) if i == 0 else h, w_in, b_in)))
    return linear(norm(h).to(p["head.weight"].dtype), p["head.weight"], p["head.bias"])


class FlowPolicy(FlatNetwork):
    """Velocity field of the flow: `prefix(obs, task) -> cache`, `velocity(cache, x, w) -> v`.

    The trunk's input is W_x x + cache + W_t temb(w), so that a state is encoded once per batch, not once per step.
    Every method takes `p`, the result of `weights(dtype)`, to share one cast between many calls.
    """

    def __init__(self, config: PolicyConfig, generator: torch.Generator | None = None) -> None:
        c = config
        self.config = c
        self.chunk = c.horizon * c.action_dim
        shapes: dict[str, tuple[int, ...]] = {
            "state.weight": (c.width, c.obs_dim),
            "state.bias": (c.width,),
            "task.embedding": (len(c.instructions), c.width),
            "time.weight": (c.width, c.time_features),
            "action.weight": (c.width, self.chunk),
        }
        super().__init__(shapes | trunk_shapes(c.width, c.blocks, c.kind, self.chunk), generator)
        self.register_buffer("frequencies", time_frequencies(c.time_features), persistent=False)

    frequencies: Tensor

    def prefix(self, obs: Tensor, task: Tensor, p: Weights | None = None) -> Tensor:
        """obs (B, D) normalised, task (B,) int64 -> cache (B, width)."""
        p = self.weights() if p is None else p
        state = F.linear(obs.to(p["state.weight"].dtype), p["state.weight"], p["state.bias"])
        return state + p["task.embedding"][task]

    def velocity(self, cache: Tensor, x: Tensor, w: Tensor, p: Weights | None = None) -> Tensor:
        """cache (B, width), x (k·B, H, A) with the states tiled k times, w 0-d or (k·B,) -> (k·B, H, A) float32."""
        p = self.weights() if p is None else p
        out = trunk(self._embed(cache, x, w, p), p, self.config.blocks, self.config.kind)
        return out.view(x.shape)

    def _embed(self, cache: Tensor, x: Tensor, w: Tensor, p: Weights) -> Tensor:
        dtype = p["action.weight"].dtype
        angle = w.unsqueeze(-1) * self.frequencies
        time = F.linear(torch.cat([angle.sin(), angle.cos()], -1).to(dtype), p["time.weight"])
        flat = x.flatten(1).to(dtype)
        tiles = len(flat) // len(cache)
        base = cache if tiles == 1 else cache.repeat(tiles, 1)
        return residual(base + time, flat, p["action.weight"])

    def frozen_velocity(self, cache: Tensor, x: Tensor, w: Tensor, p: Weights) -> Tensor:
        """As `velocity`, differentiable in x alone, by a hand-written backward pass (one graph node).

        What the lean adjoint asks of the reference; needs `kind="residual"` for the short cut.
        """
        if self.config.kind != "residual":
            return self.velocity(cache, x, w, p)
        out: Tensor = _ResidualVJP.apply(x, self, cache, w, p)
        return out


class _ResidualVJP(torch.autograd.Function):
    """The residual policy's velocity and its vector-Jacobian product in x; parameters and states are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, policy: FlowPolicy, cache: Tensor, w: Tensor, p: Weights) -> Tensor:
        h = policy._embed(cache, x, w, p)
        shape = list(h.shape[-1:])
        saved: list[Tensor] = []
        for i in range(policy.config.blocks):
            n, mean, rstd = torch.native_layer_norm(h, shape, None, None, 1e-5)
            u = F.linear(n, p[f"block{i}.in.weight"], p[f"block{i}.in.bias"])
            saved += [h, mean, rstd, u]
            h = residual(h, F.silu(u), p[f"block{i}.out.weight"])
        n, mean, rstd = torch.native_layer_norm(h, shape, None, None, 1e-5)
        ctx.saved, ctx.last, ctx.p, ctx.blocks = saved, (h, mean, rstd), p, policy.config.blocks
        return F.linear(n.to(p["head.weight"].dtype), p["head.weight"], p["head.bias"]).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        p, (h, mean, rstd) = ctx.p, ctx.last
        shape, only_input = list(h.shape[-1:]), [True, False, False]
        back = torch.ops.aten.native_layer_norm_backward
        g = (grads[0].flatten(1) @ p["head.weight"]).to(h.dtype)
        g = back(g, h, shape, mean, rstd, None, None, only_input)[0]
        for i in reversed(range(ctx.blocks)):
            h, mean, rstd, u = ctx.saved[4 * i : 4 * i + 4]
            branch = torch.ops.aten.silu_backward(g @ p[f"block{i}.out.weight"], u) @ p[f"block{i}.in.weight"]
            g = g + back(branch, h, shape, mean, rstd, None, None, only_input)[0]
        return (g @ p["action.weight"]).to(grads[0].dtype).view(grads[0].shape), None, None, None, None


class Critic(FlatNetwork):
    """Q(s, a) of each head, all heads in one batched product: `prefix(obs, task)`, then `q(cache, actions)`."""

    def __init__(self, policy: PolicyConfig, config: CriticConfig, generator: torch.Generator | None = None) -> None:
        c, self.config = config, config
        chunk = policy.horizon * policy.action_dim
        shapes: dict[str, tuple[int, ...]] = {
            "state.weight": (c.heads, c.width, policy.obs_dim),
            "state.bias": (c.heads, c.width),
            "task.embedding": (c.heads, len(policy.instructions), c.width),
            "action.weight": (c.heads, c.width, chunk),
        }
        super().__init__(shapes | trunk_shapes(c.width, c.blocks, c.kind, 1, c.heads), generator)

    def prefix(self, obs: Tensor, task: Tensor, p: Weights | None = None) -> Tensor:
        """obs (B, D) normalised, task (B,) int64 -> cache (heads, B, width)."""
        p = self.weights() if p is None else p
        states = obs.to(p["state.weight"].dtype).expand(self.config.heads, *obs.shape)
        return linear(states, p["state.weight"], p["state.bias"]) + p["task.embedding"][:, task]

    def q(self, cache: Tensor, actions: Tensor, mask: Tensor | None = None, p: Weights | None = None) -> Tensor:
        """cache, actions (B, H, A), mask (B, H) False on padding (its actions do not count) -> (heads, B) float32."""
        p = self.weights() if p is None else p
        if mask is not None:
            actions = actions * mask.unsqueeze(-1)
        flat = actions.flatten(1).to(p["action.weight"].dtype).expand(self.config.heads, -1, -1)
        h = torch.baddbmm(cache, flat, p["action.weight"].mT)
        return trunk(h, p, self.config.blocks, self.config.kind).squeeze(-1)


class Value(FlatNetwork):
    """V(s): logits over the support's atoms (eq. 20), or one scalar for the expectile ablation."""

    def __init__(
        self, policy: PolicyConfig, config: CriticConfig, outputs: int, generator: torch.Generator | None = None
    ) -> None:
        c, self.config = config, config
        shapes: dict[str, tuple[int, ...]] = {
            "state.weight": (c.width, policy.obs_dim),
            "state.bias": (c.width,),
            "task.embedding": (len(policy.instructions), c.width),
        }
        super().__init__(shapes | trunk_shapes(c.width, c.blocks, c.kind, outputs), generator)

    def logits(self, obs: Tensor, task: Tensor, p: Weights | None = None) -> Tensor:
        """obs (B, D) normalised, task (B,) int64 -> (B, outputs) float32."""
        p = self.weights() if p is None else p
        h = F.linear(obs.to(p["state.weight"].dtype), p["state.weight"], p["state.bias"]) + p["task.embedding"][task]
        return trunk(h, p, self.config.blocks, self.config.kind)


def time_frequencies(features: int) -> Tensor:
    """Angular frequencies of the flow-time embedding, (features/2,): π/2 to 32π, geometric."""
    return torch.logspace(math.log10(math.pi / 2), math.log10(32 * math.pi), features // 2)
