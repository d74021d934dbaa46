"""False promotion rate and power of the promotion gate, by simulation: `make bench-gate`.

Each simulation is a candidate and a champion with known success rates on the tasks, evaluated in rounds of one
paired episode a task, the gate being asked *after every round* until it says PASS or FAIL: the harshest use of it.
Success of the two policies is independent given the rates, which is conservative: episodes that share a seed agree
more often, and fewer differences mean less noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.envelope import RESULTS, Envelope
from flows.gate import DEFAULT_GATE, GateSpec, Verdict, load_gate, trace, verdicts
from lwd_model.statistics import wilson

# Champion's success on four tasks, spread like an SFT policy's: hard, middling, easy.
CHAMPION = (0.55, 0.70, 0.75, 0.85)
EFFECTS = (0.05, 0.10, 0.15, 0.20)
# Candidates that must not be promoted, as differences from the champion on each task.
NULLS: Mapping[str, tuple[float, ...]] = {
    "equal": (0.0, 0.0, 0.0, 0.0),
    "mixed": (0.15, -0.15, 0.10, -0.10),  # better on two tasks, worse on two: no better on average
    "worse": (-0.10, -0.10, -0.10, -0.10),
}
# Better on average, one task ruined: the per-task rule is there for this one.
RUINED = (0.25, 0.15, 0.15, -0.30)
_BATCH = 1000  # simulations at once: some 100 MB


def simulate(
    spec: GateSpec, champion: npt.ArrayLike, candidate: npt.ArrayLike, simulations: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """First terminal answer of the gate and the episodes a task that it took.

    Args:
        spec: the gate.
        champion: (K,) success rates.
        candidate: (K,) success rates.
        simulations: repetitions S.
        rng: of the outcomes.

    Returns:
        verdict (S,) of PASS or FAIL, and rounds (S,): episodes per task when it was given. The gate always ends,
        with FAIL, at the spec's maximum.
    """
    given, when = [], []
    for done in range(0, simulations, _BATCH):
        shape = (min(_BATCH, simulations - done), spec.episodes.max, len(np.asarray(champion)))
        new = rng.random(shape) < np.asarray(candidate)
        old = rng.random(shape) < np.asarray(champion)
        answers = verdicts(spec, trace(spec, new.astype(np.float64) - old))
        first = np.argmax(answers != Verdict.CONTINUE.value, axis=1)
        given.append(answers[np.arange(shape[0]), first])
        when.append(first + 1)
    return np.concatenate(given), np.concatenate(when)


def run(spec: GateSpec, simulations: int, seed: int) -> dict[str, Any]:
    """All scenarios; the `results` of gate.json."""
    rng = np.random.default_rng(seed)
    champion = np.array(CHAMPION)
    false_rates: dict[str, dict[str, float]] = {}
    for name, shift in NULLS.items():
        answers, _ = simulate(spec, champion, champion + shift, simulations, rng)
        false_rates[name] = wilson(int((answers == Verdict.PASS.value).sum()), simulations).as_dict()
    worst = max(false_rates, key=lambda name: false_rates[name]["mean"])

    power: dict[str, float] = {}
    planned: dict[str, float] = {}
    median: dict[str, float] = {}
    curves: dict[str, list[float]] = {}
    for effect in EFFECTS:
        key = f"{effect:+.2f}"
        # The same average gain, less where there is no room.
        candidate = _raised(champion, effect)
        answers, rounds = simulate(spec, champion, candidate, simulations, rng)
        passed = answers == Verdict.PASS.value
        power[key] = float(passed.mean())
        planned[key] = float((passed & (rounds <= spec.episodes.planned)).mean())
        median[key] = float(np.median(rounds))
        curves[key] = [float((passed & (rounds <= n)).mean()) for n in range(1, spec.episodes.max + 1)]
    answers, _ = simulate(spec, champion, champion + RUINED, simulations, rng)
    return {
        "alpha": spec.alpha,
        "simulations": simulations,
        "false_promotion_rate": false_rates[worst],
        "false_promotion_rate_by_null": false_rates,
        "power": power,
        "power_at_planned": planned,
        "median_episodes_to_decision": median,
        "one_task_ruined": wilson(int((answers == Verdict.PASS.value).sum()), simulations).as_dict(),
        "champion": list(CHAMPION),
        "nulls": {name: list(shift) for name, shift in NULLS.items()},
        "ruined": list(RUINED),
        "power_by_episodes": curves,
        "spec": spec.model_dump(),
    }


def _raised(rates: np.ndarray, effect: float, ceiling: float = 0.98) -> np.ndarray:
    """`rates` with their mean raised by `effect`, none above `ceiling`."""
    raised = rates + effect
    for _ in range(len(rates)):
        over = np.maximum(raised - ceiling, 0.0)
        room = raised < ceiling
        if over.sum() == 0 or not room.any():
            break
        raised = np.minimum(raised, ceiling) + np.where(room, over.sum() / room.sum(), 0.0)
    return raised


def figure(results: Mapping[str, Any], path: Path) -> Path:
    """Power against episodes per task, one line an effect, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "gate", "font.size": 10, "svg.fonttype": "none"}):
        fig, ax = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
        shades = plt.get_cmap("viridis")(np.linspace(0.8, 0.15, len(results["power_by_episodes"])))
        for (effect, curve), shade in zip(results["power_by_episodes"].items(), shades, strict=True):
            ax.plot(range(1, len(curve) + 1), curve, color=shade, label=f"gain {effect}")
        null = results["false_promotion_rate"]
        ax.axhline(null["mean"], color="#b3261e", linewidth=1.2, label=f"no gain: {null['mean']:.3f} in all")
        ax.axhline(results["alpha"], color="#b3261e", linewidth=0.8, linestyle=":", label=f"alpha {results['alpha']}")
        ax.axvline(results["spec"]["episodes"]["planned"], color="#888888", linewidth=0.8, linestyle="--")
        ax.set(xlabel="paired episodes per task (4 tasks)", ylabel="promoted so far", ylim=(0, 1.02), xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, metadata={"Date": None})
        plt.close(fig)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gate", type=Path, default=DEFAULT_GATE)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate.json")
    arguments = parser.parse_args(argv)
    envelope = Envelope("gate", "make bench-gate", [arguments.seed])
    results = run(load_gate(arguments.gate), arguments.simulations, arguments.seed)
    envelope.write(arguments.out, results)
    figure(results, arguments.out.with_suffix(".svg"))
    rate = results["false_promotion_rate"]
    print(f"false promotion rate {rate['mean']:.4f} [{rate['low']:.4f}, {rate['high']:.4f}], alpha {results['alpha']}")
    for effect, power in results["power"].items():
        print(
            f"gain {effect}: promoted {results['power_at_planned'][effect]:.2f} within the planned episodes, "
            f"{power:.2f} in the end; median {results['median_episodes_to_decision'][effect]:.0f} episodes a task"
        )
    print(f"one task ruined: promoted {results['one_task_ruined']['mean']:.4f}")


if __name__ == "__main__":
    main()
