"""What the service shows of itself: requests by route and never by path, to this machine alone."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding
from serving import Served, serving
from starlette.requests import Request

from infra.errors import ConfigError
from infra.service import observe
from infra.telemetry import instruments, metrics


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    metrics.enable("service")
    with serving(tmp_path, metrics_port=9100, robot_episodes_per_min=1) as found:
        yield found
    instruments.disable()


def shown(served: Served, prefix: str) -> dict[str, float]:
    status, body, headers = served.ask("GET", "/metrics")
    text = body.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/plain")
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(prefix)]
    return {name: float(value) for name, value in lines if "_bucket" not in name and "_sum" not in name}


def test_requests_are_counted_by_route(served: Served) -> None:
    token = served.enrol()
    served.ask("GET", "/v1/announcements?after=3", token)
    served.ask("GET", f"/v1/policies/objects/{'0' * 64}/manifest.json", token)
    served.ask("GET", "/v1/announcements", "nonsense")
    served.ask("GET", "/etc/passwd", token)
    assert shown(served, "lwd_http_requests") == {
        'lwd_http_requests_total{route="/v1/announcements",status="200"}': 1,
        'lwd_http_requests_total{route="/v1/policies/objects/{digest}/{name}",status="404"}': 1,
        'lwd_http_requests_total{route="none",status="401"}': 1,  # refused at the gate, before there is a route
        'lwd_http_requests_total{route="none",status="404"}': 1,
    }
    assert shown(served, "lwd_http_request_seconds")['lwd_http_request_seconds_count{route="/metrics"}'] >= 1


def test_who_is_sent_away_is_counted(served: Served) -> None:
    token = served.enrol()
    items = [{"episode_id": f"{number:032x}", "sha256": "0" * 64, "size": 5} for number in range(3)]
    served.ask("POST", "/v1/uploads", token, {"episodes": items})
    assert shown(served, "lwd_ingest_throttled") == {'lwd_ingest_throttled_total{kind="quota",robot="r0"}': 2}


def test_metrics_are_shown_to_this_machine_only(served: Served) -> None:
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("192.0.2.7", 404), ("2001:db8::1", 404)):
        request = Request({"type": "http", "client": (host, 1), "headers": []})
        assert observe.show(request).status_code == status, host
    proxied = Request({"type": "http", "client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"192.0.2.7")]})
    assert observe.show(proxied).status_code == 404


def test_without_a_port_nothing_is_shown(tmp_path: Path) -> None:
    with serving(tmp_path) as found:
        assert found.ask("GET", "/metrics")[0] == 404


def test_the_certificate_s_end_is_known(tmp_path: Path) -> None:
    key, name = generate_private_key(SECP256R1()), x509.Name([])
    end = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(end - datetime.timedelta(days=1)).not_valid_after(end)
    file = tmp_path / "cert.pem"
    file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    assert observe.expiry(file) == end.timestamp()
    file.write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="is no certificate"):
        observe.expiry(file)
