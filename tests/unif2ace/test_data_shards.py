"""Shards: what is written is read back, by webdataset too, and webdataset's by us; damage is noticed and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import sets
from quick import QuickEncoding

from unif2ace.data.config import FieldMap
from unif2ace.data.samples import Sample, SampleError
from unif2ace.data.shards import ShardSource, index_path, write_shard
from unif2ace.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return sets.shards(tmp_path_factory.mktemp("shards"), 13)


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "copy")


def test_what_is_written_is_read(written):
    source = ShardSource(written)
    encoding = QuickEncoding().build()
    raw = sets.open_raw(written.parent / "raw" / "faces.json")
    assert len(source) == 13
    for index in (12, 0, 5, 4):
        sample, expected = source[index], encoding(raw[index])
        assert (sample.key, sample.captions, sample.conversations, sample.text) == (
            expected.key, expected.captions, expected.conversations, None,
        )  # fmt: skip
        assert np.array_equal(sample.codes, expected.codes) and sample.codes.dtype == np.uint16
        for name in ("identity", "semantic"):
            assert np.array_equal(getattr(sample, name), getattr(expected, name).astype(np.float16))
    assert source.serving("t2i").tolist() == list(range(13)) and source.serving("lm").tolist() == []
    assert pickle.loads(pickle.dumps(source))[7].key == source[7].key


def test_webdataset_reads_ours(written):
    import webdataset

    urls = [str(path) for path in sorted(written.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    source = ShardSource(written)
    assert len(read) == len(source)
    for index, each in enumerate(read):
        assert each["__key__"] == f"{index:09d}" and each["json"]["key"] == source[index].key
        assert np.array_equal(each["codes.npy"], source[index].codes)
        assert np.array_equal(each["semantic.npy"], source[index].semantic)
        assert each["json"]["image_sha256"] == hashlib.sha256(sets.png(sets.picture(index))).hexdigest()


def test_webdataset_s_are_read(tmp_path):
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "x-%03d.tar"), maxcount=3, verbose=0) as sink:
        for number in range(7):
            record = {"file": number, "qa": [{"question": "q", "answer": str(number)}]}
            array = np.arange(4) + number
            sample = {"__key__": f"a/long-{number}" if number % 2 else f"k{number}", "png": sets.picture(number)}
            sink.write({**sample, "txt": f"caption {number}", "json": record, "codes.npy": array})
    source = ShardSource(tmp_path, FieldMap(conversations="qa"))
    assert len(source) == 7
    for number in (6, 0, 3):
        sample = source[number]
        assert sample.captions == (f"caption {number}",) and sample.conversations == ((("q", str(number)),),)
        assert np.array_equal(sample.codes, np.arange(4) + number)
        assert (sample.pixels() == sets.picture(number)).all()
    assert ShardSource(tmp_path / "x-001.tar", FieldMap(conversations="qa"))[0].captions == ("caption 3",)


def test_fields_of_foreign_shards_are_held_against_the_map(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.json", b'{"long": "a face", "n": 3}')
    with pytest.raises(UserError, match="no caption, conversation or text is known in a record that has: long, n"):
        ShardSource(tmp_path)
    assert ShardSource(tmp_path, FieldMap(caption="long"))[0].captions == ("a face",)


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_samples_need_not_have_the_same_parts(tmp_path):
    codes = np.arange(3)
    samples = [
        Sample("a", "", codes=codes, semantic=np.ones((2, 2))),
        Sample("b", "", codes=codes + 70000, identity=np.ones(3)),
        Sample("c", "", codes=codes, text="plain"),
    ]
    write_shard(tmp_path, 0, samples, 0, [], "job")
    manifest = {"shards": [{"file": "shard-00000.tar", "sha256": "x"}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    read = [*ShardSource(tmp_path)]
    for had, got in zip(samples, read):
        assert (had.key, had.text) == (got.key, got.text) and np.array_equal(had.codes, got.codes)
        for name in ("identity", "semantic"):
            assert (getattr(had, name) is None) == (getattr(got, name) is None)


def damaged(folder, extension, change):
    """Change one sample's member on disk and return the source."""
    path = folder / "shard-00001.tar"
    index = json.loads(index_path(path).read_text())
    offset, size, _ = index["places"][2][index["members"].index(extension)]
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = change(bytes(content[offset : offset + size]))
    path.write_bytes(content)
    return ShardSource(folder)


@pytest.mark.parametrize("extension", ["json", "codes.npy", "identity.npy", "semantic.npy"])
def test_one_flipped_bit_costs_one_sample(folder, extension):
    source = damaged(folder, extension, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SampleError, match=r"shard-00001\.tar at byte \d+: its bytes are not those that were written"):
        source[7]
    assert [source[index].key for index in (6, 8)] == ["face-6", "face-8"]


def test_a_shard_of_another_length_is_refused_at_once(folder):
    path = folder / "shard-00001.tar"
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(UserError, match=r"shard-00001\.tar has \d+ bytes where its index says \d+"):
        ShardSource(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.path: cannot read .*shard-00001\.tar: No such file"):
        ShardSource(folder)


def test_a_shard_that_goes_away_under_way(folder):
    source = ShardSource(folder)
    assert source[0].key == "face-0"
    os.truncate(folder / "shard-00002.tar", 700)
    with pytest.raises(SampleError, match=r"shard-00002\.tar at byte \d+: the file ends \d+ bytes early"):
        source[12]
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(SampleError, match=r"shard-00001\.tar at byte \d+: No such file"):
        source[6]


def test_an_index_that_is_damaged_is_refused(folder):
    index_path(folder / "shard-00001.tar").write_text("{")
    with pytest.raises(UserError, match=r"shard-00001\.json is damaged"):
        ShardSource(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("places"),
        lambda index: index.update(places=None),
        lambda index: index["places"].pop(),
        lambda index: index["places"][0].pop(),
        lambda index: index["places"].__setitem__(0, [[0, -1, 0]] * len(index["members"])),
        lambda index: index["places"][0].__setitem__(0, [2**70, 1, 0]),
        lambda index: index.update(members=[["json"]] * len(index["members"])),
        lambda index: index.pop("bytes"),
        lambda index: index.update(serves=[]),
    ],
)
def test_an_index_of_other_values_is_refused(folder, change):
    path = index_path(folder / "shard-00001.tar")
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="an index in .* is damaged"):
        ShardSource(folder)


@pytest.mark.parametrize("place", [[2**62, 2**62, 0], [0, 2**40, 0], [-5, 3, 0]])
def test_a_member_beyond_its_file_is_not_read(folder, place):
    path = index_path(folder / "shard-00000.tar")
    index = json.loads(path.read_text())
    index["places"][1][0] = place
    path.write_text(json.dumps(index))
    with pytest.raises(SampleError):
        ShardSource(folder)[1]


@pytest.mark.parametrize("content", ["[]", "3", '{"shards": [{}]}', '{"shards": 3}', '{"shards": [{"file": 3}]}'])
def test_a_manifest_of_other_values_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="an index in .* is damaged"):
        ShardSource(folder)


def test_unfinished_work_is_no_set(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished; run `unif2ace precompute` again"):
        ShardSource(folder)


@pytest.mark.parametrize("change", [lambda c: c[:2300], lambda c: c[:2048] + b"?" * 512 + c[2560:]])
def test_a_foreign_tar_is_read_as_far_as_it_goes(tmp_path, change):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            add(tar, f"{number}.txt", b"caption" * 30)
    path.write_bytes(change(path.read_bytes()))
    source = ShardSource(tmp_path)
    assert [each.captions for each in source] == [("caption" * 30,)] * 2
    assert source.damaged == [(str(path), "the tar file is damaged at byte 2048, after 2 samples")]


def test_a_foreign_tar_that_ends_within_a_sample(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(2):
            add(tar, f"{number}.txt", b"caption" * 30)
    os.truncate(path, 1600)
    source = ShardSource(tmp_path)
    assert source[0].captions == ("caption" * 30,)
    assert source.damaged == [(str(path), "the tar file is damaged at byte 2048, after 2 samples")]
    with pytest.raises(SampleError, match=r"a\.tar at byte 1536: the file ends 146 bytes early"):
        source[1]


def test_pickles_are_never_read(folder):
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    with tarfile.open(folder / "x.tar", "w") as tar:
        add(tar, "0.txt", b"a face")
        add(tar, "0.codes.npy", objects.getvalue())
    with pytest.raises(SampleError, match="an array of it is damaged .*never unpickled"):
        ShardSource(folder / "x.tar")[0]


@pytest.mark.parametrize("change", [(b"(4,)", b"(4, "), (b"}", b"\0")], ids=["open bracket", "null byte"])
def test_an_array_whose_header_cannot_be_read(folder, change):
    """numpy parses it as Python and lets the errors of Python's parser through."""
    array = io.BytesIO()
    np.save(array, np.arange(4))
    content = array.getvalue()
    assert change[0] in content
    with tarfile.open(folder / "x.tar", "w") as tar:
        add(tar, "0.txt", b"a face")
        add(tar, "0.codes.npy", content.replace(*change))
    with pytest.raises(SampleError, match="an array of it is damaged .*header cannot be"):
        ShardSource(folder / "x.tar")[0]


def test_features_are_left_where_they_are_when_nobody_wants_them(folder):
    """Damage to them included: a row that paints does not care."""
    source = damaged(folder, "semantic.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    sample = source.read(7, features=False)
    assert sample.identity is None and sample.semantic is None
    assert np.array_equal(sample.codes, source.read(7, features=False).codes) and sample.key == "face-7"
    with pytest.raises(SampleError, match="its bytes are not those"):
        source.read(7)


def test_a_foreign_shard_whose_first_sample_is_damaged_is_refused(tmp_path):
    """By it the fields of all others are read."""
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        member = tarfile.TarInfo("0.json")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"{x:"))
    with pytest.raises(UserError, match="first sample of .*some.tar.*damaged .*not JSON"):
        ShardSource(tmp_path / "some.tar")
