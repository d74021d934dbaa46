"""Settings come from LWD_ variables and name what is wrong with them."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from infra.settings import load_settings


def test_everything_of_a_deployment_lies_below_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LWD_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.catalog_url == f"sqlite:///{tmp_path}/catalog.db"
    assert all(path.is_relative_to(tmp_path) for path in (settings.objects_dir, settings.spool_dir, settings.keys_dir))


def test_a_value_out_of_range_is_named(monkeypatch):
    monkeypatch.setenv("LWD_LEASE_S", "-3")
    with pytest.raises(ConfigError, match=r"'lease_s'.*got '-3'") as error:
        load_settings()
    assert "LWD_LEASE_S" in error.value.fix


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="leese_s"):
        load_settings(leese_s=1)
