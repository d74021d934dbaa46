"""Dependencies point one way: flows → (lwd_model, data_contracts, infra); no torch in infra, no server in lwd_model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# package -> what none of its files may import, with the parts of our own that are allowed all the same.
FORBIDDEN = {
    "infra": {"torch", "lightning", "lwd_model", "data_contracts", "flows", "bench", "prefect", "tests"},
    "lwd_model": {"prefect", "kafka", "confluent_kafka", "aiokafka", "sqlalchemy", "alembic", "boto3", "infra", "flows",
                  "bench", "data_contracts", "tests"},
    "data_contracts": {"torch", "lightning", "lwd_model", "prefect", "sqlalchemy", "infra", "flows", "bench", "tests"},
    "flows": {"bench", "tests"},
}  # fmt: skip
ALLOWED = {
    "lwd_model": {"infra.errors", "infra.episode", "infra.reader"},
    "data_contracts": {"infra.errors", "infra.episode", "infra.variables", "infra.yaml_file"},
}
# What a robot runs: it needs a URL, a token and keys, so nothing that only a server has.
ROBOT_SIDE = ("infra/edge/*.py", "infra/policy/subscriber.py", "infra/policy/bases.py", "infra/policy/artifact.py",
              "infra/policy/keys.py", "infra/policy/announcement.py", "infra/policy/permission.py",
              "infra/policy/clock.py", "infra/policy/state.py", "infra/policy/staging.py",
              "infra/fleet/contact.py")  # fmt: skip
SERVER_ONLY = {"sqlalchemy", "alembic", "psycopg", "fastapi", "starlette", "uvicorn", "kafka", "minio",
               "prometheus_client"}  # fmt: skip
SERVER_PARTS = ("infra.catalog", "infra.service", "infra.plane", "infra.ingest", "infra.events", "infra.servers",
                "infra.objects", "infra.snapshots", "infra.coordinator", "infra.policy.channel",
                "infra.policy.registry", "infra.policy.permit", "infra.policy.refusals",
                "infra.policy.renew")  # fmt: skip
FILES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Modules imported anywhere in the file, inside functions too; `from a import b` counts as `a`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            # `from infra import errors` imports the module `infra.errors`
            whole = node.module in (*FORBIDDEN, "bench")
            found |= {f"{node.module}.{name.name}" for name in node.names} if whole else {str(node.module)}
    return found


def wrong(package: str, source: str) -> set[str]:
    """Imports that the package must not have."""
    return {
        module
        for module in imported(source)
        if module.split(".")[0] in FORBIDDEN[package] and module not in ALLOWED.get(package, ())
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert wrong(package, path.read_text()) == set()


def heavy(source: str) -> set[str]:
    """Imports that a robot's file must not have."""
    return {
        module
        for module in imported(source)
        if module.split(".")[0] in SERVER_ONLY or any(f"{module}.".startswith(f"{part}.") for part in SERVER_PARTS)
    }


@pytest.mark.parametrize("pattern", ROBOT_SIDE)
def test_the_robots_side_imports_nothing_of_the_server(pattern: str) -> None:
    paths = sorted(ROOT.glob(pattern))
    assert paths
    assert {str(path.relative_to(ROOT)): found for path in paths if (found := heavy(path.read_text()))} == {}


def test_the_check_of_the_robots_side_finds_what_it_looks_for() -> None:
    for line in ("import sqlalchemy as sa", "from minio import Minio", "from infra.catalog import Catalog",
                 "from infra import plane", "def f():\n    from infra.service.auth import Tokens"):  # fmt: skip
        assert heavy(line)
    assert not heavy("import urllib3\nfrom infra.policy.announcement import Announcement")


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("infra", "import torch.nn as nn"),
        ("infra", "def f():\n    from torch import Tensor"),
        ("infra", "from lwd_model.config import preset"),
        ("lwd_model", "import sqlalchemy as sa"),
        ("lwd_model", "from prefect import flow"),
        ("lwd_model", "from infra.catalog import Catalog"),
        ("lwd_model", "from infra import catalog"),
        ("data_contracts", "from infra.fleet.tasks import TASKS"),
    ],
)
def test_the_check_finds_what_it_looks_for(package: str, line: str) -> None:
    assert wrong(package, line)


def test_the_check_lets_the_edges_pass() -> None:
    source = "from infra.errors import ConfigError\nfrom infra import episode\nfrom infra.reader import SnapshotReader"
    assert wrong("lwd_model", source) == set()
