"""Stage `report`: tables and figures of the offline pipeline → data/report."""

from __future__ import annotations

from flows.params import Params
from flows.record import record_offline
from flows.report import build_report, record_run
from flows.stages.common import REPORT
from infra.fleet.tasks import TASKS


def run(params: Params) -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    instructions = {key: TASKS[key].instruction for key in params.tasks}
    record_run(REPORT, command="dvc repro", seeds=[params.seed], title="Offline pipeline", tasks=instructions)
    record_offline(REPORT, params)
    build_report(REPORT)
