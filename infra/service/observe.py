"""What the service shows of itself: a count and a duration for each request, and `GET /metrics`."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path

from cryptography import x509
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.errors import ConfigError
from infra.settings import Settings
from infra.telemetry import metrics

_router = APIRouter()


@_router.get("/metrics", include_in_schema=False)
def show(request: Request) -> Response:
    """This process's metrics, to this machine: they name the robots, and who asks needs no token."""
    if not metrics.enabled() or not _is_here(request):
        return Response(status_code=404)
    body, kind = metrics.render()
    return Response(body, media_type=kind)


def install(app: FastAPI, settings: Settings) -> None:
    """Have `app` count its requests and show its metrics, where `metrics_port` is set."""
    app.include_router(_router)
    if settings.metrics_port is None:
        return
    app.add_middleware(_Counted)
    if settings.ingest_cert is not None:
        metrics.CERTIFICATE_EXPIRES.set(expiry(settings.ingest_cert))


class _Counted:
    """Counts answers by the route's template, of which there are few, and never by the path that was asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            metrics.HTTP_REQUESTS.inc(route=route, status=str(status))
            metrics.HTTP_SECONDS.observe(time.monotonic() - began, route=route)


def _is_here(request: Request) -> bool:
    if any(name in request.headers for name in ("forwarded", "x-forwarded-for", "via")):
        return False  # a proxy on this machine asks for somebody elsewhere
    return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback


def expiry(chain: Path) -> float:
    """When the first certificate of a PEM chain ends, seconds since the epoch.

    Raises:
        ConfigError: it is no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(chain.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError) as error:
        raise ConfigError(f"ingest_cert {chain} is no certificate ({error})", "give a PEM chain") from error
