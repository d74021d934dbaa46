"""The episode's bytes: deterministic, read back whole, and refused when damaged."""

from __future__ import annotations

import io
import tarfile
import tracemalloc

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.episode import Episode, decode, encode, read_samples, write_samples
from infra.errors import CorruptDataError


def assert_equal(a: Episode, b: Episode) -> None:
    assert a.meta() == b.meta()
    for name in ("observations", "actions", "rewards", "intervention", "timestamps"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 40), success=st.booleans())
def test_an_episode_is_read_back_whole_and_its_bytes_depend_on_content_alone(make_episode, seed, steps, success):
    episode = make_episode(seed, steps=steps, success=success)
    data = encode(episode)
    assert_equal(decode(data), episode)
    assert encode(decode(data)) == data


def test_a_shard_of_episodes_is_what_webdataset_reads(make_episode, tmp_path):
    episodes = [make_episode(seed) for seed in range(3)]
    path = tmp_path / "shard-000000.tar"
    with path.open("wb") as stream:
        write_samples(episodes, stream)
    samples = list(wds.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [episode.episode_id for episode in episodes]
    np.testing.assert_array_equal(samples[1]["actions.npy"], episodes[1].actions)
    with path.open("rb") as stream:
        for read, episode in zip(read_samples(stream), episodes, strict=True):
            assert_equal(read, episode)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5])
def test_a_truncated_tar_is_refused(make_episode, share):
    data = encode(make_episode(steps=200))
    with pytest.raises(CorruptDataError, match="episode"):
        decode(data[: int(len(data) * share)])


def rewrite(data: bytes, change) -> bytes:
    """The tar with `change(info, payload) -> list of (info, payload)` applied to each member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for info in old:
            for made, payload in change(info, old.extractfile(info).read()):
                made.size = len(payload)
                new.addfile(made, io.BytesIO(payload))
    return out.getvalue()


def renamed(info: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, p: [] if "actions" in i.name else [(i, p)], "lacks actions.npy"),
        (lambda i, p: [(i, p), (i, p)], "repeated"),
        (lambda i, p: [(renamed(i, "../../etc/passwd"), p)], "does not begin with an episode id"),
        (lambda i, p: [(i, p[:20] if "rewards" in i.name else p)], "cannot be read"),
        (lambda i, p: [(i, b"{}" if "meta" in i.name else p)], "cannot be read"),
        (lambda i, p: [(i, p.replace(b"<f4", b"<i4") if "actions" in i.name else p)], "actions is int32"),
    ],
    ids=["missing", "duplicate", "path-traversal", "short-array", "empty-meta", "dtype"],
)
def test_a_damaged_tar_is_refused_by_name(make_episode, change, message):
    with pytest.raises(CorruptDataError, match=message):
        decode(rewrite(encode(make_episode()), change), name="upload")


def test_a_link_is_refused(make_episode):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(f"{'0' * 32}.meta.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(CorruptDataError, match="not a plain file"):
        decode(out.getvalue())


def sparse(name: str, size: int, style: str) -> bytes:
    """A tar of one sparse file: `size` bytes, of which all but the last are a hole."""
    out = io.BytesIO()
    info = tarfile.TarInfo(name)
    if style == "gnu":  # the map is in the header itself
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 1
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\0%011o\0" % (size - 1, 1)
        header[483:495] = b"%011o\0" % size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        out.write(bytes(header) + b"x".ljust(512, b"\0") + bytes(1024))
        return out.getvalue()
    sparse_map = b"1\n%d\n1\n" % (size - 1)
    payload = sparse_map.ljust(512, b"\0") + b"x"
    info.size = len(payload)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def oversized(name: str, size: int) -> bytes:
    """A tar whose header announces far more than follows."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


def crowded(number: int) -> bytes:
    """One sample of very many members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in range(number):
            tar.addfile(tarfile.TarInfo(f"{'0' * 32}.{member}"))
    return out.getvalue()


META = f"{'0' * 32}.meta.json"
ACTIONS = f"{'0' * 32}.actions.npy"


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (sparse(META, 200 * 2**20, "gnu"), "not a plain file"),
        (sparse(META, 200 * 2**20, "pax"), "not a plain file"),
        (oversized(META, 2**33 - 1), "over the cap"),
        (oversized(ACTIONS, 200 * 2**20), "truncated|unexpected end"),
        (crowded(1000), "none of an episode's"),
    ],
    ids=["sparse", "sparse-pax", "huge-member", "announced-member", "members"],
)
def test_a_tar_bomb_is_refused_in_little_memory(bomb: bytes, message: str) -> None:
    assert len(bomb) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(CorruptDataError, match=message):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", ["(100000000,)", "(10000000000000,)", "(-1,)"])
def test_an_array_that_announces_more_than_it_holds_is_refused(make_episode, shape):
    """NumPy sets the room aside before it reads."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
    payload = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(16)
    data = rewrite(encode(make_episode()), lambda i, p: [(i, payload if "rewards" in i.name else p)])
    with pytest.raises(CorruptDataError, match="cannot be read"):
        decode(data)


def test_an_archive_of_arrays_is_no_array(make_episode):
    """numpy.load would take it for one, and unpack it."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, actions=np.zeros((1000, 1000), np.float32))
    data = rewrite(encode(make_episode()), lambda i, p: [(i, buffer.getvalue() if "actions" in i.name else p)])
    with pytest.raises(CorruptDataError, match="cannot be read"):
        decode(data)


def test_a_pickled_array_is_refused(make_episode):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = rewrite(encode(make_episode()), lambda i, p: [(i, buffer.getvalue() if "actions" in i.name else p)])
    with pytest.raises(CorruptDataError, match="cannot be read"):
        decode(data)
