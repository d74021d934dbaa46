"""The stages of `dvc.yaml`, one file each: `python -m flows.stages NAME` reads `params.yaml` and writes its outputs."""
