"""The S3 store on a bad network, and with a server that is busy, silent or dead: bounded tries, never short bytes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from invariants import digest
from objects_contract import GOOD, keys, upload
from test_objects_s3 import opened_with

from infra.errors import CorruptDataError, UnavailableError
from infra.objects import ObjectStore, UnreadableError, episode_key
from infra.objects.s3 import PART_BYTES, S3Store
from infra.objects.s3_bucket import TRIES
from infra.plane import open_objects
from infra.servers import Servers
from infra.servers.proxy import FaultProxy
from infra.settings import Settings, load_settings

DATA = hashlib.shake_256(b"data").digest(3 * 2**20)
KEY = episode_key(digest(DATA))


@pytest.fixture
def settings(fleet_home: Path) -> Settings:
    return load_settings(home=fleet_home)


@pytest.fixture
def direct(settings: Settings) -> ObjectStore:
    """The store, past the proxy."""
    return open_objects(settings)


@pytest.fixture
def proxy(settings: Settings) -> Iterator[FaultProxy]:
    url = urlsplit(str(settings.s3_endpoint))
    with FaultProxy(str(url.hostname), int(url.port or 0)) as running:
        yield running


@pytest.fixture
def store(settings: Settings, proxy: FaultProxy) -> S3Store:
    return through(proxy, settings)


def through(proxy: FaultProxy, settings: Settings, timeout_s: float = 2.0) -> S3Store:
    return opened_with(settings, endpoint=f"http://127.0.0.1:{proxy.port}", timeout_s=timeout_s)


def acts(store: S3Store) -> list[Callable[[], object]]:
    return [
        lambda: store.get("incoming/r0/a"),
        lambda: store.exists("incoming/r0/a"),
        lambda: list(store.list("incoming")),
        lambda: store.put("incoming/r0/b", b"x"),
        lambda: store.delete("incoming/r0/b"),
        lambda: store.accept("incoming/r0/a", digest(DATA), len(DATA)),
    ]


@pytest.mark.parametrize("gently", [True, False], ids=["FIN", "RST"])
def test_a_truncated_answer_is_asked_for_again(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy, gently: bool
) -> None:
    direct.put("incoming/r0/a", DATA)
    for number, length in enumerate((0, 100, 2 * 2**20), start=1):
        proxy.set(cut_after_bytes=length, cut_times=TRIES - 1, cut_gently=gently)
        assert store.get("incoming/r0/a") == DATA
        assert proxy.counts()["cut"] == number * (TRIES - 1)


@pytest.mark.parametrize("gently", [True, False], ids=["FIN", "RST"])
def test_answers_that_are_always_truncated_are_no_answers(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy, gently: bool
) -> None:
    """Not corrupt data either: the upload is not to be thrown away for it."""
    direct.put("incoming/r0/a", DATA)
    proxy.set(cut_after_bytes=2**20, cut_gently=gently)
    for act in (lambda: store.get("incoming/r0/a"), lambda: store.accept("incoming/r0/a", digest(DATA), len(DATA))):
        before = proxy.counts()["cut"]
        with pytest.raises(UnreadableError, match="incoming/r0/a did not come whole at any try"):
            act()
        assert proxy.counts()["cut"] - before == TRIES
    assert keys(direct, "episodes") == []
    proxy.clear()
    assert store.accept("incoming/r0/a", digest(DATA), len(DATA)) == KEY


def test_an_object_that_cannot_be_read_is_replaced_by_its_upload(
    store: S3Store, direct: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose bytes the server has lost, as far as a client can see."""
    incoming = upload(direct, DATA)
    direct.put(KEY, DATA[:-1] + b"x")
    real = store._bucket.digest

    def lost(key: str, size: int) -> tuple[str, str]:
        if key == KEY:
            raise UnreadableError("lost", "")
        return real(key, size)

    monkeypatch.setattr(store._bucket, "digest", lost)
    store.accept(incoming, digest(DATA), len(DATA))
    assert direct.get(KEY) == DATA


def test_an_answer_that_was_lost_is_asked_for_again_by_each_method(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy
) -> None:
    """The server had done it: nothing is done twice that shows."""
    direct.put("incoming/r0/a", DATA)
    for number, act in enumerate(acts(store), start=1):
        proxy.set(cut_after_bytes=0, cut_times=1)
        act()
        assert proxy.counts()["cut"] == number
    assert direct.get(KEY) == DATA
    assert keys(direct, "incoming") == ["incoming/r0/a"]


def test_an_upload_in_parts_bears_a_lost_answer_at_each_step(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy
) -> None:
    """Begun, two parts, completed: four answers of some 250 bytes each."""
    for step in range(5):
        data = hashlib.shake_256(bytes([step])).digest(PART_BYTES + 5)
        proxy.set(cut_after_bytes=step * 250, cut_times=1)
        store.put("incoming/r0/a", data)
        assert digest(direct.get("incoming/r0/a")) == digest(data)
    assert proxy.counts()["cut"] >= 4
    store.sweep_unfinished(-60)
    assert keys(direct, "incoming") == ["incoming/r0/a"]


def test_row_08_a_busy_store_is_asked_again(store: S3Store, direct: ObjectStore, proxy: FaultProxy) -> None:
    direct.put("incoming/r0/a", DATA)
    for act in acts(store):
        proxy.set(status=503, status_requests=TRIES - 1)
        act()
        assert proxy.status_requests == 0
    assert direct.get(KEY) == DATA
    for status in (429, 500, 502, 504):
        proxy.set(status=status, status_requests=1)
        assert store.get("incoming/r0/a") == DATA
        assert proxy.status_requests == 0


def test_a_server_that_stays_busy_is_named_after_bounded_tries(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy
) -> None:
    direct.put("incoming/r0/a", DATA)
    for act in acts(store):
        proxy.set(status=503, status_requests=1000)
        with pytest.raises(UnavailableError, match=f"http://127.0.0.1:{proxy.port} answered 503") as caught:
            act()
        assert not isinstance(caught.value, UnreadableError)  # it is not that object alone
        assert 1000 - proxy.status_requests in (TRIES, TRIES + 1)  # after reads, once more for another question
    assert keys(direct, "episodes") == []


def test_row_08_a_silent_store_is_given_up_within_bounds(
    settings: Settings, direct: ObjectStore, proxy: FaultProxy
) -> None:
    store = through(proxy, settings, timeout_s=0.5)
    direct.put("incoming/r0/a", DATA)
    proxy.blackhole = True
    for act in acts(store)[:2]:
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="sent nothing for 0.5 s"):
            act()
        assert time.monotonic() - begun >= 1.0
    assert proxy.counts()["accepted"] <= 7  # three tries at most, and for a read one more question
    proxy.clear()
    assert through(proxy, settings).get("incoming/r0/a") == DATA


def test_a_server_that_takes_no_connection_is_named(store: S3Store, direct: ObjectStore, proxy: FaultProxy) -> None:
    direct.put("incoming/r0/a", DATA)
    proxy.refuse = True
    for act in acts(store):
        with pytest.raises(UnavailableError, match="broke the connection"):
            act()
    proxy.close()
    for act in acts(store):
        with pytest.raises(UnavailableError, match=r"took no connection \(ECONNREFUSED\)"):
            act()


def test_a_slow_link_is_borne(store: S3Store, proxy: FaultProxy) -> None:
    """It takes longer than the time-out, but is never silent for as long."""
    proxy.set(delay_s=0.05, rate_bytes_s=1.4e6)
    begun = time.monotonic()
    store.put("incoming/r0/a", DATA)
    assert store.get("incoming/r0/a") == DATA
    assert time.monotonic() - begun > 4.0


def test_connections_that_died_while_they_were_idle_do_no_harm(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy
) -> None:
    direct.put("incoming/r0/a", GOOD)
    threads = [threading.Thread(target=store.get, args=("incoming/r0/a",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert proxy.reset() > 0
    for _ in range(8):
        assert store.get("incoming/r0/a") == GOOD


def test_no_more_connections_are_opened_than_the_pool_has(
    store: S3Store, direct: ObjectStore, proxy: FaultProxy
) -> None:
    direct.put("incoming/r0/a", GOOD)
    proxy.delay_s = 0.02
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(store.get("incoming/r0/a"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [GOOD] * 16
    assert proxy.counts()["accepted"] == 4


def test_a_killed_server_is_named_and_found_again_with_what_it_acknowledged(
    direct: ObjectStore, servers: Servers, settings: Settings
) -> None:
    store = opened_with(settings)
    final = store.accept(upload(store, DATA), digest(DATA), len(DATA))
    servers.garage.kill()
    with pytest.raises(UnavailableError, match=str(settings.s3_endpoint)):
        store.get(final)
    servers.garage.start()
    assert store.get(final) == DATA


def test_row_03_a_store_killed_while_it_takes_an_upload_shows_no_part_of_it(
    direct: ObjectStore, servers: Servers, settings: Settings, proxy: FaultProxy
) -> None:
    store = through(proxy, settings)
    proxy.rate_bytes_s = 4e6
    failed: list[Exception] = []

    def put() -> None:
        try:
            store.put("incoming/r0/a", DATA)
        except UnavailableError as error:
            failed.append(error)

    upload_thread = threading.Thread(target=put)
    upload_thread.start()
    while proxy.counts()["up"] < 2**20:
        time.sleep(0.01)
    servers.garage.kill()
    upload_thread.join()
    assert len(failed) == 1
    servers.garage.start()
    assert keys(direct, "incoming") == []
    with pytest.raises(CorruptDataError, match="is not in"):
        direct.accept("incoming/r0/a", digest(DATA), len(DATA))
