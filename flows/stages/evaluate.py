"""Stage `evaluate`: SFT and offline policies on the same fresh start states → data/evaluation."""

from __future__ import annotations

from flows.evaluation import conditions, evaluate, write_results
from flows.params import Params
from flows.stages.common import BUNDLE, EVALUATION, OFFLINE, SFT, write_metrics
from lwd_model.evaluation import method_record


def run(params: Params) -> None:
    p, metrics = params.evaluate, {}
    for name, folder in (("sft", SFT), ("offline", OFFLINE)):
        results = evaluate(folder / BUNDLE, params.tasks, p.episodes, p.seed, workers=params.workers, title=name)
        write_results(EVALUATION / f"{name}.json", results, conditions(folder / BUNDLE, params.tasks, p.seed))
        metrics[name] = method_record([results])
    write_metrics("evaluate", metrics)
