"""What every object store promises, as tests: a store's own tests subclass `ObjectsContract` and give a `store`."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invariants import digest

from infra.errors import ConfigError, CorruptDataError
from infra.objects import ObjectStore, episode_key, incoming_key

ID = "0" * 31 + "1"
GOOD, EVIL = b"good" * 1000, b"evil" * 1000


def keys(store: ObjectStore, folder: str) -> list[str]:
    return [item.key for item in store.list(folder)]


def upload(store: ObjectStore, data: bytes) -> str:
    key = incoming_key("r0", ID)
    store.put(key, data)
    return key


class ObjectsContract:
    """The tests; a subclass gives the fixture `store`, empty.

    Attributes:
        clock_s: how finely the store tells when an object was written, seconds.
    """

    clock_s = 0.01

    @given(st.binary(max_size=3 * 2**20))
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    def test_what_is_accepted_is_read_back(self, store: ObjectStore, data: bytes) -> None:
        for key in keys(store, "episodes"):
            store.delete(key)  # of the example before
        incoming = upload(store, data)
        final = store.accept(incoming, digest(data), len(data))
        assert final == episode_key(digest(data))
        assert store.get(final) == store.get(incoming) == data
        assert [(item.key, item.size) for item in store.list("episodes")] == [(final, len(data))]
        store.delete(incoming)
        assert not store.exists(incoming)
        assert keys(store, "incoming") == []
        assert store.exists(final)

    @pytest.mark.parametrize("size", [3, 17 * 2**20])
    def test_a_file_is_taken_like_bytes_and_replaces_what_was_there(
        self, store: ObjectStore, tmp_path: Path, size: int
    ) -> None:
        data = random.Random(size).randbytes(size)
        store.put("policies/1/weights", b"before")
        (tmp_path / "f").write_bytes(data)
        store.put("policies/1/weights", tmp_path / "f")
        assert store.get("policies/1/weights") == data

    def test_a_sweep_of_what_never_ended_takes_no_object(self, store: ObjectStore) -> None:
        incoming = upload(store, GOOD)
        final = store.accept(incoming, digest(GOOD), len(GOOD))
        assert store.sweep_unfinished(older_than_s=-60) == 0
        assert store.get(final) == store.get(incoming) == GOOD

    def test_keys_are_taken_literally(self, store: ObjectStore) -> None:
        odd = sorted(f"odd/{name}" for name in ("a b+c%2F&d=?#e", "Ü/é/日本", "a/" + "k" * 200, "~!@$^*()_-=,.;'"))
        for key in odd:
            store.put(key, key.encode())
        assert keys(store, "odd") == odd
        for key in odd:
            assert store.get(key) == key.encode()
            store.delete(key)
            assert not store.exists(key)

    def test_a_key_that_leaves_the_store_is_refused(self, store: ObjectStore) -> None:
        acts = (
            store.get,
            store.delete,
            store.exists,
            lambda key: store.put(key, b"x"),
            lambda key: list(store.list(key)),
            lambda key: store.accept(key, digest(b"x"), 1),
        )
        wrong = ("../x", "/etc/passwd", "a/../../x", "a//b", "./a", "", ".aside/x", "a\0b", "a\nb", "a/" * 600 + "b")
        for key in wrong:
            for act in acts:
                with pytest.raises(ConfigError, match="object key"):
                    act(key)

    def test_a_digest_that_is_none_is_refused(self, store: ObjectStore) -> None:
        with pytest.raises(ConfigError, match="is not a sha256"):
            store.accept(upload(store, b"x"), "../" + "0" * 61, 1)

    @pytest.mark.parametrize("found", [b"", GOOD[:-1], GOOD + b"x", EVIL], ids=len)
    def test_other_bytes_than_announced_are_not_accepted(self, store: ObjectStore, found: bytes) -> None:
        with pytest.raises(CorruptDataError, match=r"bytes, announced were 4000|sha256"):
            store.accept(upload(store, found), digest(GOOD), len(GOOD))
        assert keys(store, "episodes") == []

    def test_what_is_changed_meanwhile_is_accepted_as_it_was_verified_or_not_at_all(self, store: ObjectStore) -> None:
        """A robot writes good and evil bytes to its key in turn while the service accepts."""
        incoming, final = upload(store, GOOD), episode_key(digest(GOOD))
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                store.put(incoming, EVIL)
                store.put(incoming, GOOD)

        robot = threading.Thread(target=swap)
        robot.start()
        outcomes = set()
        try:
            for _ in range(200):
                try:
                    store.accept(incoming, digest(GOOD), len(GOOD))
                except CorruptDataError:
                    outcomes.add("refused")
                    assert not store.exists(final)
                else:
                    outcomes.add("accepted")
                    assert store.get(final) == GOOD
                    store.delete(final)
                if len(outcomes) == 2:
                    break
        finally:
            stop.set()
            robot.join()
        assert outcomes == {"accepted", "refused"}

    def test_accepting_twice_is_one_object_as_young_as_the_second(self, store: ObjectStore) -> None:
        final = store.accept(upload(store, GOOD), digest(GOOD), len(GOOD))
        first = next(store.list("episodes"))
        time.sleep(self.clock_s)
        assert store.accept(upload(store, GOOD), digest(GOOD), len(GOOD)) == final
        (second,) = store.list("episodes")
        assert (second.key, second.size) == (first.key, first.size)
        assert second.modified > first.modified  # a sweep of what was never committed counts from the second
        assert store.get(final) == GOOD

    @pytest.mark.parametrize("damaged", [EVIL, GOOD[:-1], b""], ids=len)
    def test_accepting_again_mends_a_damaged_object(self, store: ObjectStore, damaged: bytes) -> None:
        incoming = upload(store, GOOD)
        final = store.accept(incoming, digest(GOOD), len(GOOD))
        store.put(final, damaged)
        store.accept(incoming, digest(GOOD), len(GOOD))
        assert store.get(final) == GOOD

    def test_evil_bytes_do_not_touch_the_good_object_at_their_address(self, store: ObjectStore) -> None:
        final = store.accept(upload(store, GOOD), digest(GOOD), len(GOOD))
        with pytest.raises(CorruptDataError):
            store.accept(upload(store, EVIL), digest(GOOD), len(GOOD))
        assert store.get(final) == GOOD

    def test_an_absent_object_is_named(self, store: ObjectStore) -> None:
        absent = f"episodes/ab/{'ab' * 32}.tar"
        for act in (store.get, lambda key: store.accept(key, digest(GOOD), 4)):
            with pytest.raises(CorruptDataError, match=f"{absent} is not in"):
                act(absent)
        assert not store.exists(absent)
        store.delete(absent)  # no error: deletions are repeated

    def test_a_list_is_of_one_folder_in_order_of_key(self, store: ObjectStore) -> None:
        before = time.time() - 2.0
        for key in ("a/z", "a/b/c", "a/b-c", "a/b", "ab/x", "a.x"):
            if key != "a/b":  # no folder is an object, too
                store.put(key, key.encode())
        found = list(store.list("a"))
        assert [item.key for item in found] == ["a/b-c", "a/b/c", "a/z"]
        assert [item.size for item in found] == [5, 5, 3]
        assert all(before <= item.modified <= time.time() + 2.0 for item in found)
        assert keys(store, "a/") == [item.key for item in found]
        assert keys(store, "a/z") == keys(store, "none") == []

    def test_writers_of_one_key_never_mix(self, store: ObjectStore) -> None:
        contents = [bytes([n]) * 200_000 for n in range(4)]
        writers = [threading.Thread(target=store.put, args=("k", content)) for content in contents]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
        assert store.get("k") in contents
