"""What runs when: the Prefect flows, one file each and thin, the `lwd` command line, the promotion gate, the report.

`params.py` types `params.yaml`; `pipeline.py` runs the stages that `dvc.yaml` defines (`stages/` holds what each
does); `gate.py` with `gates/*.yaml` decides about promotion; `report/` turns a run's record into one HTML page.
The other three packages import nothing from here.
"""
