"""The episode's bytes: deterministic, read back whole, and refused when damaged."""

from __future__ import annotations

import io
import tarfile

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
    with pytest.raises(CorruptDataError, match="not a regular file"):
        decode(out.getvalue())


def test_a_pickled_array_is_refused(make_episode):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    data = rewrite(encode(make_episode()), lambda i, p: [(i, buffer.getvalue() if "actions" in i.name else p)])
    with pytest.raises(CorruptDataError, match="cannot be read"):
        decode(data)
