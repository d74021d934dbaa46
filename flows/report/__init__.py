"""The report of a run: stages record what they found (`record`), `build_report` makes one HTML page and a JSON file.

    record_run(run_dir, command="make demo", seeds=[0])      # first
    record_evaluation(run_dir, "sft", episodes)              # whenever a stage has something to say
    build_report(run_dir)                                    # at any time: the page says what is still missing

The page needs no network and no server: style, figures and pictures are inside it. `data` is the typed layout of what
lies in `RUN/record/`; `figures` draws with `style`, `media` packs camera frames, `page` assembles.
"""

from flows.report.data import ReportData
from flows.report.page import build_report
from flows.report.record import (
    composition_of,
    record_composition,
    record_diagnosis,
    record_evaluation,
    record_frames,
    record_gate,
    record_latency,
    record_learning_curve,
    record_loop,
    record_model_card,
    record_quarantine,
    record_run,
    record_training,
)

__all__ = [
    "ReportData",
    "build_report",
    "composition_of",
    "record_composition",
    "record_diagnosis",
    "record_evaluation",
    "record_frames",
    "record_gate",
    "record_latency",
    "record_learning_curve",
    "record_loop",
    "record_model_card",
    "record_quarantine",
    "record_run",
    "record_training",
]
