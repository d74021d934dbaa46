"""False promotion rate and power of the promotion gate and the canary, by simulation: `make bench-gate`.

Candidate and champion have known success rates on the tasks and are evaluated in rounds of one paired episode a task,
the gate being asked *after every round* until it says PASS or FAIL: the harshest use of it. Outcomes of the two
policies are independent given the rates, which is conservative: episodes that share a start state agree more often,
and fewer differences mean less noise. The reference is the champion here; another one only adds reasons to hold.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.envelope import RESULTS, Envelope
from bench.gate_canary import CHAMPION_AT_WORK, chain, harm_by_drift
from bench.gate_figure import figure
from bench.gate_nulls import CHAMPION, best_of, other_environment, simulate, stream_after, stream_before
from flows.canary_gate import CanarySpec, load_canary
from flows.gate import DEFAULT_GATE, GateSpec, Verdict, episodes_at, level_at, load_gate
from lwd_model.statistics import wilson

EFFECTS = (0.05, 0.10, 0.20)
POSITIONS = (1, 10, 50, 365)  # in the stream of candidates, nothing having been promoted before
YEAR = 365
SEQUENCE = 50
GOOD = {"candidates": 100, "share": 0.2}  # a stream in which some candidates are better, by 0.1
# Single candidates that must not be promoted, as differences from the champion on each task.
NULLS: Mapping[str, tuple[float, ...]] = {
    "equal": (0.0, 0.0, 0.0, 0.0),
    "mixed": (0.15, -0.15, 0.10, -0.10),  # better on two tasks, worse on two: no better on average
    "worse_by_0.1": (-0.10, -0.10, -0.10, -0.10),
    # Better on average, one task ruined: the per-task rule is there for this one.
    "one_task_ruined": (0.25, 0.15, 0.15, -0.30),
}
CHAIN = {"candidates": 15, "loss": 0.02}
DRIFT = 0.2


def run(spec: GateSpec, canary: CanarySpec, simulations: int, seed: int, year: int = YEAR) -> dict[str, Any]:
    """All scenarios; the `results` of gate.json.

    Args:
        simulations: of one candidate. What takes a stream of them is repeated less often: see `_repetitions`.
        year: candidates in a year.
    """
    rng = np.random.default_rng(seed)
    repetitions = _repetitions(simulations)
    stream = _stream(spec, repetitions, year, rng)
    power = _power(spec, repetitions["power"], rng)
    nulls = {name: entry["false_promotion_rate"] for name, entry in stream.items()}
    first = power[str(POSITIONS[0])]
    return {
        "alpha": spec.alpha,
        "simulations": simulations,
        "repetitions": repetitions,
        "false_promotion_rate": max(nulls.values(), key=lambda rate: rate["mean"]),
        "power": {effect: entry["promoted"] for effect, entry in first.items()},
        "median_episodes_to_decision": {effect: entry["median_to_decision"] for effect, entry in first.items()},
        "episodes_to_promote_0.1_better_in_0.9": {t: entry["+0.10"]["in_0.9"] for t, entry in power.items()},
        "stream": stream,
        "stream_with_better_ones": _good_stream(spec, repetitions["good_streams"], year, rng),
        "canary_chain": _chain(canary, spec, repetitions["chains"], rng),
        "canary_drift": _drift(canary, repetitions["drifts"], rng),
        "power_by_position": power,
        "champion": CHAMPION.tolist(),
        "champion_at_work": CHAMPION_AT_WORK.tolist(),
        "spec": spec.model_dump(),
    }


def _repetitions(simulations: int) -> dict[str, int]:
    shares = {
        "single": 1, "years": 8, "years_before": 60, "sequences_before": 15, "power": 3, "good_streams": 100,
        "chains": 40, "drifts": 5,
    }  # fmt: skip
    return {name: max(2, simulations // share) for name, share in shares.items()}


def _stream(spec: GateSpec, repetitions: Mapping[str, int], nights: int, rng: np.random.Generator) -> dict[str, Any]:
    """By null: how often at least one candidate is promoted, before and after."""
    n = repetitions["single"]
    found: dict[str, Any] = {}

    def add(name: str, candidates: int, before: np.ndarray, after: np.ndarray, **more: Any) -> None:
        found[name] = {"candidates": candidates, "before": _rate(before), "false_promotion_rate": _rate(after)} | more

    def single(shift: Sequence[float], level: float) -> np.ndarray:
        return simulate(spec, CHAMPION, CHAMPION + shift, n, rng, level)[0] == Verdict.PASS.value

    for name, shift in NULLS.items():
        add(name, 1, single(shift, spec.alpha), single(shift, level_at(spec, 1, 0)))
    for count in (10, 32):
        before, after = (best_of(spec, count, n, rng, fresh=fresh) for fresh in (False, True))
        add(f"best_of_{count}", count, before, after)
    for easier in (0.05, 0.1):
        before, after = (other_environment(spec, easier, n, rng, interleaved=together) for together in (False, True))
        add(f"environment_easier_by_{easier}", 1, before, after)

    few = repetitions["sequences_before"]
    year = stream_after(spec, np.zeros((repetitions["years"], nights), dtype=bool), CHAMPION, rng)
    fresh = stream_before(spec, CHAMPION, SEQUENCE, few, rng, kept=False).any(axis=1)
    add(
        f"equal_{SEQUENCE}_in_sequence",
        SEQUENCE,
        stream_before(spec, CHAMPION, SEQUENCE, few, rng).any(axis=1),
        year[:, :SEQUENCE].any(axis=1),
        before_with_a_fresh_champion=_rate(fresh),
    )
    before = stream_before(spec, CHAMPION, nights, repetitions["years_before"], rng).any(axis=1)
    add("equal_nightly_for_a_year", nights, before, year.any(axis=1))
    worse = CHAMPION - 0.02
    after = stream_after(spec, np.ones((few, SEQUENCE), dtype=bool), worse, rng).any(axis=1)
    before = stream_before(spec, worse, SEQUENCE, few, rng).any(axis=1)
    add(f"worse_by_0.02_{SEQUENCE}_in_sequence", SEQUENCE, before, after)
    return found


def _good_stream(spec: GateSpec, streams: int, nights: int, rng: np.random.Generator) -> dict[str, Any]:
    """Some candidates are better by 0.1: the false share among the promotions, mean over the streams."""
    count = min(int(GOOD["candidates"]), nights)
    found: dict[str, Any] = {"candidates": count, "share_better": GOOD["share"], "streams": streams}
    for name, controlled in (("before", False), ("after", True)):
        better = rng.random((streams, count)) < GOOD["share"]
        taken = stream_after(spec, better, raised(CHAMPION, 0.1), rng, controlled=controlled)
        false, all_of_them = (taken & ~better).sum(axis=1), taken.sum(axis=1)
        found[name] = {
            "false_share": float((false / np.maximum(all_of_them, 1)).mean()),
            "promotions": float(all_of_them.mean()),
            "better_ones_promoted": float(taken[better].mean()) if better.any() else None,
        }
    return found


def _power(spec: GateSpec, simulations: int, rng: np.random.Generator) -> dict[str, Any]:
    """By position and gain: share promoted, and episodes a task that it takes."""
    found: dict[str, Any] = {}
    for position in POSITIONS:
        level = level_at(spec, position, 0)
        most = episodes_at(spec, level).max
        found[str(position)] = {}
        for effect in EFFECTS:
            answers, rounds = simulate(spec, CHAMPION, raised(CHAMPION, effect), simulations, rng, level)
            passed = answers == Verdict.PASS.value
            curve = np.array([(passed & (rounds <= n)).mean() for n in range(1, most + 1)])
            found[str(position)][f"{effect:+.2f}"] = {
                "promoted": float(passed.mean()),
                "in_0.5": _reaches(curve, 0.5),
                "in_0.9": _reaches(curve, 0.9),
                "median_to_decision": float(np.median(rounds)),
                "at_most": most,
                "curve": [round(float(share), 4) for share in curve[9::10]],  # after 10, 20, 30 ... episodes a task
            }
    return found


def _chain(canary: CanarySpec, spec: GateSpec, simulations: int, rng: np.random.Generator) -> dict[str, Any]:
    count, loss = int(CHAIN["candidates"]), CHAIN["loss"]
    before, after = (
        chain(canary, spec, count, loss, simulations, rng, shown_better=better).mean() for better in (False, True)
    )
    start = float(CHAMPION_AT_WORK.mean())
    return {
        f"worse_by_{loss}": {
            "candidates": count,
            "success_at_start": start,
            "success_before": float(before),
            "success_after": float(after),
            "success_change_before": float(before) - start,
            "success_change": float(after) - start,
        }
    }


def _drift(canary: CanarySpec, simulations: int, rng: np.random.Generator) -> dict[str, Any]:
    """False HARM of an equal candidate while the work becomes harder."""
    return {
        name: {
            "drift": DRIFT,
            "before": _rate(harm_by_drift(canary, DRIFT, simulations, rng, sudden=sudden, concurrent=False)),
            "after": _rate(harm_by_drift(canary, DRIFT, simulations, rng, sudden=sudden, concurrent=True)),
        }
        for name, sudden in (("evenly_over_the_trial", False), ("as_the_trial_begins", True))
    }


def _rate(events: np.ndarray) -> dict[str, float]:
    return wilson(int(events.sum()), len(events)).as_dict()


def _reaches(curve: np.ndarray, share: float) -> int | None:
    """Episodes a task after which so many were promoted; None where the gate ends before."""
    return int(np.argmax(curve >= share)) + 1 if curve[-1] >= share else None


def raised(rates: np.ndarray, effect: float, ceiling: float = 0.98) -> np.ndarray:
    """`rates` with their mean raised by `effect`, none above `ceiling`: the same gain, less where there is no room."""
    higher = rates + effect
    for _ in range(len(rates)):
        over = np.maximum(higher - ceiling, 0.0)
        room = higher < ceiling
        if over.sum() == 0 or not room.any():
            break
        higher = np.minimum(higher, ceiling) + np.where(room, over.sum() / room.sum(), 0.0)
    return higher


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--year", type=int, default=YEAR, help="candidates in a year")
    parser.add_argument("--gate", type=Path, default=DEFAULT_GATE)
    parser.add_argument("--out", type=Path, default=RESULTS / "gate.json")
    arguments = parser.parse_args(argv)
    envelope = Envelope("gate", "make bench-gate", [arguments.seed])
    results = run(load_gate(arguments.gate), load_canary(), arguments.simulations, arguments.seed, arguments.year)
    envelope.write(arguments.out, results)
    figure(results, arguments.out.with_suffix(".svg"))
    for name, entry in results["stream"].items():
        print(
            f"{name}: promoted {entry['before']['mean']:.4f} before, {entry['false_promotion_rate']['mean']:.4f} after"
        )
    for position, entry in results["power_by_position"].items():
        for effect, found in entry.items():
            print(
                f"trial {position}, gain {effect}: promoted {found['promoted']:.3f}; half within {found['in_0.5']}, "
                f"0.9 within {found['in_0.9']} episodes a task"
            )
    print(f"stream with better ones: {results['stream_with_better_ones']}")
    print(f"canary: {results['canary_chain']} {results['canary_drift']}")


if __name__ == "__main__":
    main()
