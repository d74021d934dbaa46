"""How the service answers what it does not do: every error as {kind, problem, fix} with the HTTP status that fits."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from infra.edge.server import RefusedError, to_wire
from infra.errors import ConfigError, ConflictError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.process import redact
from infra.service.limits import LaterError

_MAX_TEXT = 1000  # of what an answer says; some of it is the request's own
_STATUS = {RefusedError: 401, ConfigError: 422, CorruptDataError: 422, ConflictError: 409, StorageFullError: 507,
           UnavailableError: 503}  # fmt: skip
_log = logging.getLogger("lwd.service")


class ForeignError(ConfigError):
    """The token is another robot's, or of another cohort."""


def install(app: FastAPI) -> None:
    """Have `app` answer its errors in this way."""
    app.add_exception_handler(LwdError, explain)
    app.add_exception_handler(RequestValidationError, _explain_invalid)
    app.add_exception_handler(HTTPException, _explain_http)
    app.add_exception_handler(Exception, _explain_bug)


def said(error: LwdError) -> dict[str, str]:
    """`to_wire`, of a length that no request can drive up."""
    return {name: text[:_MAX_TEXT] for name, text in to_wire(error).items()}


def answer(status: int, error: LwdError, after: float | None = None) -> JSONResponse:
    """An error as an answer; `after` seconds, another try is worth it."""
    headers = {} if after is None else {"Retry-After": str(max(1, round(after)))}
    wire = {name: redact(text) for name, text in said(error).items()}
    return JSONResponse(wire, status, headers | ({"WWW-Authenticate": "Bearer"} if status == 401 else {}))


def explain(_: Request, error: Exception) -> Response:
    """The answer to an LwdError."""
    assert isinstance(error, LwdError)
    if isinstance(error, LaterError):
        return answer(error.status, error, error.after)
    if isinstance(error, ForeignError):
        return answer(403, error)
    status = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), 500)
    if status >= 500:
        _log.warning("not served: %s", error.problem)
    return answer(status, error, 1.0 if status == 503 else None)


def _explain_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return answer(422, ConfigError(f"the request's {where}: {first['msg']}", "see /openapi.json"))


def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (404, 405):
        return answer(
            error.status_code,
            CorruptDataError(f"there is no {request.method} {request.url.path[:120]}", "see /openapi.json"),
        )
    return answer(error.status_code, ConfigError(str(error.detail), "see /openapi.json"))


def _explain_bug(_: Request, error: Exception) -> Response:
    return answer(500, UnavailableError(f"the service failed ({type(error).__name__})", "see its log, and try again"))
