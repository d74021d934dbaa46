"""What an installation from a wheel has: every file that the code or its users read, and the licence."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("data_contracts", "flows", "infra", "lwd_model")
OF_THE_CLONE = {
    "infra/Dockerfile",
    "infra/Dockerfile.dockerignore",
    "infra/.env",
    "infra/tls/cert.pem",
    "infra/tls/key.pem",
}


def test_every_file_that_is_no_module_is_shipped() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package in PACKAGES:
        files = {path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        files -= set((ROOT / package).rglob("*.py"))
        named = {path for pattern in shipped.get(package, ()) for path in (ROOT / package).glob(pattern)}
        left_out = {str(path.relative_to(ROOT)) for path in files - named} - OF_THE_CLONE
        assert not left_out, "name them under package-data in pyproject.toml"


def test_the_licence_that_is_named_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = project["license-files"]
    title, version = project["license"].split("-")
    text = (ROOT / name).read_text()
    assert f"{title} License" in text and f"Version {version}" in text
