"""A small file system for tests of full disks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str, *, lazily: bool = False) -> Iterator[Path]:
    """A tmpfs of `size` (256k, 6m) at `folder` where the user may mount one; elsewhere the test is skipped.

    Args:
        lazily: let go of it although somebody still has a file open there; otherwise that is an error.
    """
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", *(["-l"] if lazily else []), str(folder)], check=True)
