"""A frozen workspace: a copy of the code, the pipeline and its parameters in a folder of its own.

A long benchmark goes on from where it was, on the code it began with, whatever is edited meanwhile. The workspace is
a DVC repository without SCM, so that `dvc repro` inside it is the same pipeline, and a second run is a no-op.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CODE = ("flows", "lwd_model", "data_contracts", "infra", "bench", "dvc.yaml", ".dvcignore")


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section."""
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def freeze(folder: Path, overrides: dict[str, Any]) -> Path:
    """Make `folder` a workspace, unless it is one already.

    Args:
        folder: where.
        overrides: parameters that differ from `params.yaml`.
    """
    marker = folder / ".frozen"
    if marker.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in CODE:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    params = merged(yaml.safe_load((ROOT / "params.yaml").read_text()), overrides)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    if not (folder / ".dvc").exists():
        subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    marker.touch()
    return folder
