"""One seed of the learning benchmark, run inside its frozen workspace: `python -m bench.learning_seed`.

The offline pipeline, the online stage, evaluation; everything is resumable, so that it may be stopped and run again.
"""

from __future__ import annotations

import json
from pathlib import Path

from flows import pipeline
from flows.console import say
from flows.deployment import deployment
from flows.evaluation import evaluate, read_results
from flows.online import deploy_first, summarise, supervise
from flows.params import load_params
from flows.promotion import results_of
from flows.record import online_steps, policy_curve
from flows.stages.common import EVALUATION
from lwd_model.evaluation import method_record

HOME, RESULT = Path("home"), Path("result.json")
CURVE_POINTS, CURVE_SEED = 4, 2_000_000


def main() -> None:
    """Run what is missing, then write `result.json`."""
    params = load_params()
    for stage in pipeline.stages():
        say(f"stage {stage}")
        pipeline.run(stage)
    deploy_first.fn(str(HOME))
    restarts = supervise.fn(str(HOME), "params.yaml")
    with deployment(HOME) as plane:
        last = plane.registry.policies()[0]["version"]
        online = results_of(plane, params, last, params.evaluate.episodes)
        curve = []
        for version, episodes in policy_curve(plane, CURVE_POINTS if params.evaluate.curve else 0):
            results = evaluate(
                plane.bundle(version),
                params.tasks,
                params.evaluate.curve,
                CURVE_SEED,
                workers=params.workers,
                title=f"v{version}",
            )
            curve.append({"episodes": episodes, "success": method_record([results])["success"]})
        updates = {"sft": params.sft.updates, "offline": params.offline.updates, "online": params.online.updates}
        found = {name: read_results(EVALUATION / f"{name}.json") for name in ("sft", "offline")} | {"online": online}
        result = {
            "seed": params.seed,
            "updates": updates,
            "env_steps": {"online": online_steps(plane)},
            "episodes": {name: [r.as_dict() for r in results] for name, results in found.items()},
            "curve": curve,
            "loop": vars(summarise(plane, restarts)),
        }
    RESULT.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
