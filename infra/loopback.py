"""Loopback is asked directly, whatever the proxy variables say: what listens there is not reachable through a proxy."""

from __future__ import annotations

import importlib.util
import os

HOSTS = ("127.0.0.1", "localhost", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def ask_directly() -> None:
    """Extend `no_proxy` and `NO_PROXY` of this process and of those it starts by loopback.

    A proxy that no client here can use (of a scheme without its library, as SOCKS) is left out: httpx would refuse to
    make any client at all, also for loopback.
    """
    named = [word.strip() for name in ("no_proxy", "NO_PROXY") for word in os.environ.get(name, "").split(",")]
    whole = ",".join(dict.fromkeys([word for word in named if word] + list(HOSTS)))
    if "*" in named:
        whole = "*"
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = whole
    for name in _PROXIES:
        for variable in (name, name.upper()):
            scheme, mark, _ = os.environ.get(variable, "").partition("://")
            if mark and not _usable(scheme.lower()):
                del os.environ[variable]


def _usable(scheme: str) -> bool:
    if scheme in ("socks5", "socks5h"):
        return importlib.util.find_spec("socksio") is not None
    return scheme in ("http", "https")
