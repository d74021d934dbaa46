"""One seed of the learning benchmark, run inside its frozen workspace: `python -m bench.learning_seed`.

The offline pipeline, the online stage, evaluation; everything is resumable, so that it may be stopped and run again.
"""

from __future__ import annotations

import json
from pathlib import Path

from flows import pipeline
from flows.console import say
from flows.deployment import deployment
from flows.evaluation import read_results
from flows.online import deploy_first, summarise, supervise
from flows.params import load_params
from flows.promotion import results_of
from flows.record import learning_curve, online_steps
from flows.stages.common import EVALUATION

HOME, RESULT = Path("home"), Path("result.json")
CURVE_POINTS = 4


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
        curve = learning_curve(plane, params, CURVE_POINTS)
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
