import json

import numpy as np
import pytest
import webdataset

from infra.episode import encode
from infra.errors import ConfigError, CorruptDataError
from lwd_model.shards import read_buffer, read_index, write_buffer
from tests.lwd_model.factory import episode

EPISODES = [
    episode(i, steps=5 + i, success=i % 2 == 0, task=i % 2, source="demo" if i < 3 else "play") for i in range(7)
]


def test_round_trip_in_order_over_several_shards(tmp_path):
    index = write_buffer(EPISODES, tmp_path, shard_bytes=2 * len(encode(EPISODES[0])))
    assert len(index.shards) > 2 and sum(s.episodes for s in index.shards) == 7
    assert [encode(e) for e in read_buffer(tmp_path)] == [encode(e) for e in EPISODES]
    assert read_index(tmp_path) == index


def test_index_counts_by_task_source_and_outcome(tmp_path):
    index = write_buffer(EPISODES, tmp_path)
    assert index.composition["S1"]["demo"] == {"success": 2}
    assert index.composition["S2"]["play"] == {"time_limit": 2}
    assert (index.episodes, index.steps) == (7, sum(e.steps for e in EPISODES))


def test_equal_buffers_have_equal_digests_and_old_shards_go(tmp_path):
    first = write_buffer(EPISODES, tmp_path / "a", shard_bytes=1)
    assert write_buffer(iter(EPISODES), tmp_path / "b", shard_bytes=1) == first
    write_buffer(EPISODES[:1], tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.tar"))) == 1


def test_webdataset_reads_the_shards(tmp_path):
    index = write_buffer(EPISODES, tmp_path)
    data = webdataset.WebDataset(str(tmp_path / index.shards[0].name), shardshuffle=False).decode()
    samples = list(data)
    assert [s["__key__"] for s in samples] == [e.episode_id for e in EPISODES]
    np.testing.assert_array_equal(samples[3]["actions.npy"], EPISODES[3].actions)
    assert samples[3]["meta.json"]["source"] == "play"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_named_and_nothing_of_it_is_used(tmp_path, damage):
    index = write_buffer(EPISODES, tmp_path, shard_bytes=1)
    path = tmp_path / index.shards[2].name
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.unlink() if damage == "remove" else path.write_bytes(bytes(data[:-700] if damage == "truncate" else data))
    seen: list[str] = []
    with pytest.raises(CorruptDataError, match=path.name):
        seen.extend(e.episode_id for e in read_buffer(tmp_path))
    assert seen == [e.episode_id for e in EPISODES[:2]]


def test_a_damaged_index_is_named(tmp_path):
    with pytest.raises(CorruptDataError, match="index.json"):
        read_index(tmp_path)
    write_buffer(EPISODES, tmp_path)
    data = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(data | {"format": 99}))
    with pytest.raises(CorruptDataError, match="index.json"):
        read_index(tmp_path)


def test_empty_and_duplicate_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no episodes"):
        write_buffer([], tmp_path)
    with pytest.raises(CorruptDataError, match=EPISODES[0].episode_id):
        write_buffer([EPISODES[0], EPISODES[0]], tmp_path)
