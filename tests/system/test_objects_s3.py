"""The S3 store on a real server: the promises of every store, presigned URLs, quotas, and what it says when denied."""

from __future__ import annotations

import functools
import hashlib
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import urllib3
from invariants import digest
from minio.commonconfig import CopySource
from objects_contract import EVIL, GOOD, ObjectsContract, keys, upload
from small_disk import small_disk

from infra.errors import ConfigError, CorruptDataError, StorageFullError, UnavailableError
from infra.objects import UnreadableError, episode_key
from infra.objects import s3 as s3_module
from infra.objects import s3_bucket as bucket_module
from infra.objects.s3 import PART_BYTES, S3Store
from infra.plane import open_objects
from infra.servers import Servers
from infra.servers.garage import Garage
from infra.settings import Settings, load_settings

FINAL = episode_key(digest(GOOD))


@pytest.fixture
def settings(fleet_home: Path) -> Settings:
    return load_settings(home=fleet_home)


@pytest.fixture
def store(settings: Settings) -> S3Store:
    opened = open_objects(settings)
    assert isinstance(opened, S3Store)
    return opened


def opened_with(settings: Settings, **changes: Any) -> S3Store:
    secret = settings.s3_secret_key
    assert secret is not None
    values: dict[str, Any] = {
        "endpoint": settings.s3_endpoint,
        "bucket": settings.s3_bucket,
        "access_key": settings.s3_access_key,
        "secret_key": secret.get_secret_value(),
        "region": settings.s3_region,
        "timeout_s": 2.0,
        "pool": 4,
    } | changes
    return S3Store(values.pop("endpoint"), values.pop("bucket"), **values)


class TestS3(ObjectsContract):
    """The contract, on Garage."""

    clock_s = 1.1  # S3 tells seconds; Garage's lists tell milliseconds


# --- accept -----------------------------------------------------------------------------------------------------------


def swap_after_hashing(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its robot writes other bytes to the upload just when it has been verified."""
    real = store._bucket.digest

    def hashed(key: str, size: int) -> tuple[str, str]:
        found = real(key, size)
        if key.startswith("incoming/"):
            store.put(key, EVIL)
        return found

    monkeypatch.setattr(store._bucket, "digest", hashed)


def test_bytes_swapped_after_they_were_verified_are_not_copied(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This server honours the condition on the ETag."""
    swap_after_hashing(store, monkeypatch)
    with pytest.raises(CorruptDataError, match="was changed after its sha256 was verified"):
        store.accept(upload(store, GOOD), digest(GOOD), len(GOOD))
    assert keys(store, "episodes") == []


def test_a_server_that_ignores_the_condition_is_found_out(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_condition(source: str, etag: str, size: int, target: str) -> None:
        store._bucket.client.copy_object(store._bucket.name, target, CopySource(store._bucket.name, source))

    swap_after_hashing(store, monkeypatch)
    monkeypatch.setattr(store._bucket, "copy", without_condition)
    with pytest.raises(CorruptDataError, match="as other bytes than were verified"):
        store.accept(upload(store, GOOD), digest(GOOD), len(GOOD))
    assert keys(store, "episodes") == []


def test_a_copy_that_was_acknowledged_and_is_not_there_is_not_accepted(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    incoming = upload(store, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "copy", lambda *_: None)
        with pytest.raises(UnavailableError, match="does not hold it"):
            store.accept(incoming, digest(GOOD), len(GOOD))
    assert store.get(store.accept(incoming, digest(GOOD), len(GOOD))) == GOOD


def test_a_large_object_is_copied_in_parts(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "COPY_BYTES", 6 * 2**20)
    data = hashlib.shake_256(b"large").digest(13 * 2**20)
    incoming = upload(store, data)
    for _ in range(2):  # onto itself, too
        final = store.accept(incoming, digest(data), len(data))
        assert digest(store.get(final)) == digest(data)
    swap_after_hashing(store, monkeypatch)
    store.delete(final)
    with pytest.raises(CorruptDataError, match="was changed"):
        store.accept(incoming, digest(data), len(data))
    assert keys(store, "episodes") == []


def test_what_the_uploader_says_of_its_bytes_is_not_kept(store: S3Store) -> None:
    """A Content-Encoding would have clients unpack them."""
    url = store.presign_put("incoming/r0/x", len(GOOD), 60)
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/html"}
    assert urllib3.request("PUT", url, body=GOOD, headers=headers).status == 200
    final = store.accept("incoming/r0/x", digest(GOOD), len(GOOD))
    answer = urllib3.request("GET", store.presign_get(final, 60), decode_content=False)
    assert (answer.data, answer.headers["Content-Type"]) == (GOOD, "application/x-tar")
    assert "Content-Encoding" not in answer.headers


def test_bytes_damaged_at_rest_are_never_returned_and_sending_them_again_mends_them(
    store: S3Store, servers: Servers
) -> None:
    """Garage finds the damage when it reads, and breaks its answer off."""
    data = secrets.token_bytes(2**20 - 7)  # no other test has that block
    folder = servers.garage.data / "data"
    before = set(folder.rglob("*"))
    final = store.accept(upload(store, data), digest(data), len(data))
    (block,) = (path for path in set(folder.rglob("*")) - before if path.is_file())
    damaged = bytearray(block.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    block.write_bytes(damaged)
    with pytest.raises(UnreadableError, match=f"object {final} did not come whole at any try"):
        store.get(final)
    assert store.exists(final)
    store.accept(upload(store, data), digest(data), len(data))
    assert store.get(final) == data


# --- presigned URLs ---------------------------------------------------------------------------------------------------


def status(method: str, url: str) -> int:
    return urllib3.request(method, url, body=EVIL if method == "PUT" else None).status


def test_a_url_permits_its_own_key_and_method_only(store: S3Store, settings: Settings) -> None:
    ours, theirs = "incoming/r0/a", "incoming/r1/a"
    store.put(theirs, GOOD)
    url = store.presign_put(ours, len(EVIL), 60)
    assert url.startswith(f"{settings.s3_endpoint}/{settings.s3_bucket}/{ours}?")
    assert status("PUT", url) == 200
    assert store.get(ours) == EVIL
    denied = {
        "another key": status("PUT", url.replace(ours, theirs)),
        "an episode": status("PUT", url.replace(ours, FINAL)),
        "reading": status("GET", url),
        "deleting": status("DELETE", url),
        "a longer time": status("PUT", url.replace("Expires=60", "Expires=6000")),
        "writing with a URL to read": status("PUT", store.presign_get(ours, 60)),
        "nothing signed": status("PUT", url.partition("?")[0]),
        "the bucket": status("GET", url.replace(f"/{ours}", "/")),
    }
    assert all(400 <= code < 500 for code in denied.values()), denied
    assert (store.get(theirs), store.get(ours)) == (GOOD, EVIL)
    assert status("GET", store.presign_get(theirs, 60)) == 200


@pytest.mark.parametrize("size", [0, 1, len(GOOD) - 1, len(GOOD) + 1, 10 * len(GOOD)])
def test_a_url_permits_as_many_bytes_as_were_announced(store: S3Store, size: int) -> None:
    """A robot cannot fill the store: what it may send, its quota has counted."""
    key = f"incoming/r0/sized-{size}"
    url = store.presign_put(key, len(GOOD), 60)
    body = (GOOD * 10)[:size]
    assert urllib3.request("PUT", url, body=body).status == 403
    assert urllib3.request("PUT", url.replace("content-length%3B", ""), body=body).status == 403
    pieces = urllib3.request("PUT", url, body=iter([body]))  # chunked: of no announced length
    assert 400 <= pieces.status < 500
    assert not store.exists(key)
    assert urllib3.request("PUT", url, body=GOOD).status == 200
    assert store.get(key) == GOOD


def test_a_url_expires(store: S3Store) -> None:
    urls = {"PUT": store.presign_put("incoming/r0/b", len(EVIL), 1), "GET": store.presign_get("incoming/r0/a", 1)}
    store.put("incoming/r0/a", GOOD)
    time.sleep(2.1)  # the server tells whole seconds
    assert all(400 <= status(method, url) < 500 for method, url in urls.items())
    assert not store.exists("incoming/r0/b")


def test_a_url_for_no_time_is_refused(store: S3Store) -> None:
    for seconds in (0, -1, 0.5, 7 * 86400 + 1, float("nan")):
        with pytest.raises(ConfigError, match="a URL cannot be valid"):
            store.presign_put("incoming/r0/a", 1, seconds)


def test_a_url_for_a_key_that_leaves_the_store_is_refused(store: S3Store) -> None:
    with pytest.raises(ConfigError, match="object key"):
        store.presign_put("incoming/r0/../../episodes/x", 1, 60)


# --- lists and uploads in parts ---------------------------------------------------------------------------------------


def test_a_list_has_pages(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's, of 7 here, inside those of ours, after each of which a list can be taken up again."""
    names = sorted(f"incoming/r{n % 2}/{n:03d}" for n in range(40))
    for name in names:
        store.put(name, b"x")
    client = store._bucket.client
    monkeypatch.setattr(client, "_list_objects", functools.partial(client._list_objects, max_keys=7))
    for page in (1, 7, 20, 21, 1000):
        monkeypatch.setattr(s3_module, "PAGE", page)
        monkeypatch.setattr(bucket_module, "PAGE", page)
        assert keys(store, "incoming") == names
        assert keys(store, "incoming/r1") == [name for name in names if "/r1/" in name]


def test_uploads_in_parts_that_never_ended_are_swept(store: S3Store) -> None:
    client, name = store._bucket.client, store._bucket.name
    for key in ("incoming/r0/a", "incoming/r0/b"):
        begun = client._create_multipart_upload(name, key, {})
        client._upload_part(name, key, GOOD, None, begun, 1)
    store.put("incoming/r0/c", bytes(PART_BYTES + 1))
    assert keys(store, "incoming") == ["incoming/r0/c"]  # what has not ended is not there
    assert store.sweep_unfinished(older_than_s=3600) == 0
    assert store.sweep_unfinished(older_than_s=-60) == 2
    assert store.sweep_unfinished(older_than_s=-60) == 0
    assert not store._bucket.abort("incoming/r0/a", begun)
    assert store.get("incoming/r0/c") == bytes(PART_BYTES + 1)


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_quota_is_named_and_leaves_nothing(store: S3Store, settings: Settings, servers: Servers) -> None:
    def limit(size: str) -> None:
        cli = [str(servers.garage.program), "-c", str(servers.garage.data / "garage.toml")]
        argv = [*cli, "bucket", "set-quotas", settings.s3_bucket, "--max-size", size]
        subprocess.run(argv, check=True, capture_output=True)

    limit("1MiB")
    incoming = upload(store, bytes(600_000))
    for attempt in (
        lambda: store.put("incoming/r0/x", bytes(600_000)),
        lambda: store.put("incoming/r0/x", bytes(PART_BYTES + 1)),
    ):
        with pytest.raises(StorageFullError, match="has no room for incoming/r0"):
            attempt()
    assert keys(store, "incoming") == [incoming]
    limit("none")
    store.put("incoming/r0/x", bytes(600_000))


def test_row_10_a_full_disk_of_the_store_is_named_and_recovers(
    tmp_path: Path, servers: Servers, settings: Settings
) -> None:
    with small_disk(tmp_path / "disk", "6m") as disk:
        garage = Garage(servers.garage.programs, tmp_path / "garage", objects=disk)
        try:
            garage.start()
            access = {"access_key": garage.access_key, "secret_key": garage.secret_key, "bucket": "lwd"}
            store = opened_with(settings, endpoint=garage.endpoint, **access)
            blob = hashlib.shake_256(b"disk").digest(PART_BYTES + 2**20)
            store.put("incoming/r0/a", blob[: 3 * 2**20])
            for _ in range(2):
                with pytest.raises(StorageFullError, match="has no room for incoming/r0/b"):
                    store.put("incoming/r0/b", blob[-4 * 2**20 :])
            # Of more than four blocks Garage says nothing at all when the first finds no room: the time-out ends it.
            with pytest.raises((StorageFullError, UnavailableError)):
                store.put("incoming/r0/b", blob)
            assert keys(store, "incoming") == ["incoming/r0/a"]
            assert store.get("incoming/r0/a") == blob[: 3 * 2**20]
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            store.put("incoming/r0/b", blob)
            assert store.get("incoming/r0/b") == blob
        finally:
            garage.kill()


# --- what is wrong with the settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("bucket", "another-bucket", "no bucket another-bucket"),
        ("secret_key", "0" * 64, "denies access"),
        ("access_key", "GK" + "0" * 24, "denies access"),
        ("region", "elsewhere", "s3_region"),
    ],
)
def test_what_is_denied_names_the_setting_and_no_secret(
    settings: Settings, setting: str, value: str, named: str
) -> None:
    store = opened_with(settings, **{setting: value})
    acts = (
        lambda: store.get("a"),
        lambda: store.exists("a"),
        lambda: store.put("a", b"x"),
        lambda: store.delete("a"),
        lambda: list(store.list("a")),
        lambda: store.accept("a", digest(b"x"), 1),
        lambda: store.sweep_unfinished(0),
    )
    assert settings.s3_secret_key is not None and settings.s3_access_key is not None
    for act in acts:
        with pytest.raises(ConfigError, match=named) as caught:
            act()
        hidden = (settings.s3_secret_key.get_secret_value(), settings.s3_access_key, "0" * 24, "Signature")
        assert not any(secret in str(caught.value) for secret in hidden)
        assert str(settings.s3_endpoint) in str(caught.value)
