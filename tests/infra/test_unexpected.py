"""What nobody foresaw ends in a message with a fix, never in a traceback on the screen."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import urllib.error
from pathlib import Path

import httpx
import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.unexpected import explained


def raised_by(cause: BaseException) -> RuntimeError:
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CorruptDataError("a", "b"), CorruptDataError),
        (raised_by(CorruptDataError("a", "b")), CorruptDataError),
        (ConnectionRefusedError(111, "refused"), UnavailableError),
        (raised_by(httpx.ConnectError("no")), UnavailableError),
        (urllib3.exceptions.ProtocolError("no"), UnavailableError),
        (TimeoutError(), UnavailableError),
        (OSError(errno.ENOSPC, "full", "/x"), StorageFullError),
        (PermissionError(errno.EACCES, "denied", "/x"), ConfigError),
        (FileNotFoundError(errno.ENOENT, "gone", "/x"), ConfigError),
        (OSError(errno.EMFILE, "too many"), UnavailableError),
        (OSError("without a number"), LwdError),
        (MemoryError(), LwdError),
        (KeyError("colour"), LwdError),
        (socket.gaierror(-2, "name"), LwdError),
        (urllib.error.URLError("x"), LwdError),
    ],
)
def test_each_kind_gets_its_own_message(error: Exception, kind: type[LwdError]) -> None:
    known = explained(error)
    assert type(known) is kind
    assert known.problem and known.fix


def test_a_defect_keeps_its_traceback_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    try:
        {}["colour"]
    except KeyError as error:
        known = explained(error)
    written = tmp_path / f"lwd-error-{os.getpid()}.txt"
    assert "KeyError" in known.problem and str(written) in known.fix
    assert "test_unexpected.py" in written.read_text()


@given(st.text())
def test_a_message_has_a_bound(text: str) -> None:
    assert len(explained(ValueError(text * 100)).problem) < 400


SCRIPT = """
import sys
from infra.process import process_arguments, run_process
def work(stop):
    raise {error}
sys.exit(run_process(process_arguments("x", "y").parse_args(["--home", "."]), work, label="robot r1"))
"""


@pytest.mark.parametrize("error", ["KeyError('τ')", "ValueError(b'x')", "ConnectionResetError()", "RecursionError()"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_process_ends_with_a_line_and_a_code(error: str, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    said = done.stderr.decode(encoding)
    assert done.returncode in (1, 8)
    assert "robot r1: " in said and "fix: " in said
