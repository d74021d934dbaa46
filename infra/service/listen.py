"""The service's port: bound, with TLS where it is configured, never in the clear beyond this machine by accident."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import ssl
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from infra.errors import ConfigError
from infra.service.accept import Acceptor, connections_that_fit
from infra.service.door import Door, Guest
from infra.service.wire import Connection
from infra.settings import Settings

_GRACE_S = 10  # at the end, for requests that are being answered
_log = logging.getLogger("lwd.service")


class _Server(uvicorn.Server):
    """Accepts through a door; ends without waiting for idle robots, of whom those with TLS would not say goodbye.

    Args:
        config: uvicorn's. taken: the listening socket. door: who may come in.
    """

    def __init__(self, config: uvicorn.Config, taken: socket.socket, door: Door) -> None:
        super().__init__(config)
        self._taken, self._door = taken, door

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        acceptor = Acceptor(self._taken, self._door, self.config.ssl, self._make)
        self.servers = [acceptor]  # type: ignore[list-item]  # of which uvicorn asks no more
        self.started = True

    def _make(self, guest: Guest) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._door, guest)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()
        await super().shutdown(sockets)


class Listener:
    """A port that is taken from here on; `serve` answers on it.

    Args:
        settings: `ingest_host`, `ingest_port` (0 for any free one), `ingest_cert`, `ingest_key`, `ingest_insecure`.

    Raises:
        ConfigError: the port is taken, the certificate cannot be used, or the service would speak in the clear to
            other machines.
    """

    def __init__(self, settings: Settings) -> None:
        self._host = settings.ingest_host
        self._tls = _certificate(settings)
        self._connections, self._per_address = settings.ingest_connections, settings.ingest_connections_per_address
        family, address = _resolve(settings.ingest_host, settings.ingest_port)
        if not self._tls and not settings.ingest_insecure and not ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"ingest_host {settings.ingest_host} is reached from other machines, and there is no TLS",
                "set LWD_INGEST_CERT and LWD_INGEST_KEY; or LWD_INGEST_INSECURE=true if something before it has TLS",
            )
        self._socket = _bind(family, address, settings.ingest_port)
        self._server: uvicorn.Server | None = None

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def serve(self, app: FastAPI) -> None:
        """Answer until SIGTERM, SIGINT or `stop`; requests at work are finished."""
        cert, key = self._tls or (None, None)
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=_GRACE_S, ssl_certfile=cert,
            ssl_keyfile=key,
        )  # fmt: skip
        self._server = _Server(config, self._socket, Door(connections_that_fit(self._connections), self._per_address))
        _log.info("listening", extra={"fields": {"url": self.url}})
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def stop(self) -> None:
        """End `serve`, from another thread."""
        if self._server is not None:
            self._server.should_exit = True

    def close(self) -> None:
        """Give the port back."""
        self._socket.close()


def _certificate(settings: Settings) -> tuple[str, str] | None:
    """The files of certificate and key, loaded once to see that they can be."""
    cert, key = settings.ingest_cert, settings.ingest_key
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ConfigError("only one of ingest_cert and ingest_key is set", "set both, or none")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"ingest_cert {cert} and ingest_key {key} cannot be used ({error})", "give a PEM chain and its own key"
        ) from error
    return str(cert), str(key)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"ingest_host {host!r} is no address ({error.strerror})", "set LWD_INGEST_HOST") from error
    family, *_, address = found[0]
    return family, str(address[0])


def _bind(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    # Named as TCP, without which asyncio would not set TCP_NODELAY, and every answer would take 40 ms.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((address, port))
        taken.listen(socket.SOMAXCONN)
    except OSError as error:
        taken.close()
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise ConfigError(
            f"port {port} of {address} {why}", "stop what listens there, or set LWD_INGEST_PORT"
        ) from error
    return taken
