"""Records of LLaVA, parquet and `datasets` files as samples: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import pickle

import pytest
import sets

from unif2ace.data.config import FieldMap, SetConfig
from unif2ace.data.samples import SampleError
from unif2ace.data.sources import open_source
from unif2ace.errors import UserError


def opened(path, **changes):
    return open_source(SetConfig(str(path), **changes), "data.sets[0]")


def written(folder, records, name="faces.json"):
    path = folder / name
    lines = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in records)
    path.write_text(lines if name.endswith("l") else json.dumps(records), encoding="utf-8")
    return path


def as_parquet(folder, records):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "faces.parquet"
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=3)
    return path


def as_datasets(folder, records):
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return folder / "saved"


KINDS = {
    "json": lambda folder, records: written(folder, records),
    "jsonl": lambda folder, records: written(folder, records, "faces.jsonl"),
    "parquet": as_parquet,
    "datasets": as_datasets,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_records_are_the_same_samples(kind, tmp_path):
    sets.llava(tmp_path, 8)
    source = opened(KINDS[kind](tmp_path, [sets.record(number) for number in range(8)]), images=str(tmp_path))
    assert len(source) == 8
    for number in (0, 7, 3):
        sample = source[number]
        assert sample.key == f"face-{number}" and sample.captions == (f"{sets.WORDS[number % 5]} {number}",)
        turns = ((f"which face is this, {number}?", f"the face {number}"), ("and the hair?", "dark hair"))
        assert sample.conversations == (turns[: 2 if number % 3 else 1],)
        assert (sample.pixels() == sets.picture(number)).all()
        assert sample.serves("t2i") and sample.serves("mmu") and not sample.serves("lm")
    again = pickle.loads(pickle.dumps(source))  # as a worker process gets it
    assert again[5] == source[5] and again.fingerprint == source.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_the_fingerprint_is_of_the_records(kind, tmp_path):
    names = []
    for number, count in enumerate((6, 6, 7)):
        folder = tmp_path / str(number)
        folder.mkdir()
        names.append(opened(KINDS[kind](folder, [sets.record(number) for number in range(count)])).fingerprint)
    assert names[0] == names[1] != names[2]


def test_bytes_of_pictures_in_a_table(tmp_path):
    records = [{"image": {"bytes": sets.png(sets.picture(n)), "path": "x.png"}, "caption": "a face"} for n in range(4)]
    assert (opened(as_parquet(tmp_path, records))[3].pixels() == sets.picture(3)).all()


def test_datasets_with_decoded_pictures(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    records = [{"image": {"bytes": sets.png(sets.picture(n)), "path": None}, "caption": "a face"} for n in range(3)]
    datasets.Dataset.from_list(records, features=features).save_to_disk(tmp_path / "saved")
    assert (opened(tmp_path / "saved")[2].pixels() == sets.picture(2)).all()


def test_several_sets_in_one_folder_are_named(tmp_path):
    import datasets

    parts = {name: datasets.Dataset.from_list([{"caption": "a face"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"data\.sets\[0\]\.path: .*name one: .*saved/train, .*saved/test"):
        opened(tmp_path / "saved")
    assert len(opened(tmp_path / "saved" / "train")) == 1


@pytest.mark.parametrize("name", ["faces.json", "faces.jsonl"])
def test_records_of_one_image_are_one_sample(name, tmp_path):
    records = [
        {"image": "a.png", "caption": "gr\u00fcn \u2603"},
        {"image": "b.png", "caption": "b"},
        {"image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "s"}]},
        {"caption": "no image 1"},
        {"caption": "no image 2"},
    ]
    path = tmp_path / name
    lines = [json.dumps(each, ensure_ascii=False) for each in records]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]", encoding="utf-8")
    source = opened(path)
    assert [each.captions for each in source] == [("gr\u00fcn \u2603",), ("b",), ("no image 1",), ("no image 2",)]
    assert source[0].conversations == ((("q", "s"),),) and source[1].conversations == ()


def test_which_samples_serve_a_task(tmp_path):
    records = [{"caption": "c"}, {"text": "plain"}, {"question": "q", "answer": "a"}, {"caption": "", "text": "t"}]
    source = opened(written(tmp_path, records))
    found = {task: source.serving(task).tolist() for task in ("t2i", "mmu", "lm")}
    assert found == {"t2i": [0], "mmu": [0, 2], "lm": [1, 3]}
    for task, indices in found.items():
        assert [index for index in range(4) if source[index].serves(task)] == indices


@pytest.mark.parametrize(
    "value, expected",
    [
        ([{"role": "user", "content": " q "}, {"role": "assistant", "content": "a"}], (("q", "a"),)),
        ([{"from": "system", "value": "be brief"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
         (("be brief q", "a"),)),
        ([{"question": "q <image>", "answer": "a"}, {"question": "r", "answer": "b"}], (("q", "a"), ("r", "b"))),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}],
         (("q", "a"),)),
    ],
)  # fmt: skip
def test_ways_to_write_a_conversation(value, expected, tmp_path):
    records = [{"conversations": value}, {"conversations": json.dumps(value)}, {"conversations": [value, value]}]
    source = opened(written(tmp_path, records))
    assert [each.conversations for each in source] == [(expected,), (expected,), (expected, expected)]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "'gpt' speaks out of turn"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "'human' speaks out"),
        ({"conversations": [{"from": "human", "value": 3}]}, "expected a text, got 3"),
        ({"conversations": ["a"]}, "expected a turn"),
        ({"conversations": "{"}, "conversations: not JSON"),
        ({"conversations": 7}, "expected a list of turns, got 7"),
        ({"conversations": [[], 2]}, "expected a list of turns, got 2"),
        ({"conversations": {"from": "human"}}, "expected a list of turns, got {"),
        ({"caption": 7}, "caption: expected a text or a list of them, got 7"),
        ({"caption": "c", "image": 7}, "image: expected a file name or bytes, got 7"),
        ({"text": 7}, "field text: expected a text, got 7"),
        ({"caption": "\ud83d"}, "a text of it is no Unicode"),
        ({"caption": "a", "conversations": [{"question": "\ud83d", "answer": "a"}]}, "no Unicode"),
        ({"caption": "a", "conversations": [{"question": "a", "answer": "\ud83d"}]}, "no Unicode"),
        ({"text": "\ud83d"}, "no Unicode"),
        ({"caption": "a", "id": "\ud83d"}, "no Unicode"),
        ([], "expected a record with its fields"),
    ],
)
def test_a_damaged_record_says_where_and_what(record, reason, tmp_path):
    source = opened(written(tmp_path, [{"caption": "a face"}, record]))
    assert source[0].captions == ("a face",)
    with pytest.raises(SampleError, match=rf"faces\.json at byte \d+: .*{reason}"):
        source[1]


NESTED = "[" * 100_000 + "]" * 100_000  # Python's reader gives up with an error of its own


def test_json_without_end_is_damage(tmp_path):
    (tmp_path / "a.json").write_text(f"[{NESTED}]")
    with pytest.raises(UserError, match="is damaged at byte 1"):
        sets.open_raw(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_text(json.dumps(sets.record(0)) + "\n" + NESTED)
    source = sets.open_raw(tmp_path / "a.jsonl")
    assert source[0].key == "face-0"
    with pytest.raises(SampleError, match="not JSON"):
        source[1]


def test_a_damaged_line_is_one_sample(tmp_path):
    source = opened(written(tmp_path, [{"caption": "a"}, '{"caption": "b', "", {"caption": "c"}], "faces.jsonl"))
    assert len(source) == 3 and source[2].captions == ("c",)
    with pytest.raises(SampleError, match=r"faces\.jsonl at byte 17: not JSON"):
        source[1]


@pytest.mark.parametrize(
    "content", ['[{"caption": "a"}, {"cap', '[{"caption": "a"} {"b": 1}]', '{"caption": "a"}', "[]"]
)
def test_a_damaged_list_is_refused(content, tmp_path):
    path = tmp_path / "faces.json"
    path.write_text(content)
    with pytest.raises(UserError, match="faces.json"):
        opened(path)


def test_a_file_that_changed_is_noticed(tmp_path):
    path = sets.llava(tmp_path, 3)
    source = opened(path)
    path.write_text(path.read_text()[:-200])
    with pytest.raises(SampleError, match="the file ends .* bytes early|not JSON"):
        source[2]


@pytest.mark.parametrize("content", [b"", b"not a picture", sets.png(sets.picture(0))[:60]])
def test_a_picture_that_is_none(content, tmp_path):
    path = sets.llava(tmp_path, 2)
    (tmp_path / "1.png").write_bytes(content)
    with pytest.raises(SampleError, match=r"1\.png: it is not a picture") as caught:
        opened(path)[1].pixels()
    assert caught.value.corrupt
    (tmp_path / "1.png").unlink()
    with pytest.raises(SampleError, match=r"1\.png: No such file"):
        opened(path)[1].pixels()


@pytest.mark.parametrize("name", ["\0", "\ud800"])
def test_a_name_that_no_file_has(name, tmp_path):
    (tmp_path / "faces.json").write_text(json.dumps([{**sets.record(0), "image": name}]))
    with pytest.raises(SampleError, match="image: .* names no file"):
        opened(tmp_path / "faces.json")[0].pixels()


def test_other_names_of_fields(tmp_path):
    """Such a mapping is how a set of unknown make is read."""
    talk = '[{"question": "q", "answer": "a"}]'
    records = [{"meta": {"file": f"{n}.png", "long": f"caption {n}"}, "uid": n, "vqa": talk}
               for n in range(3)]  # fmt: skip
    sets.llava(tmp_path, 3)
    fields = FieldMap(key="uid", image="meta.file", caption="meta.long", conversations="vqa")
    for source in (
        opened(written(tmp_path, records), fields=fields),
        opened(as_parquet(tmp_path, records), fields=fields),
    ):
        sample = source[2]
        assert (sample.key, sample.captions, sample.conversations) == ("2", ("caption 2",), ((("q", "a"),),))
        assert (sample.pixels() == sets.picture(2)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_is_not_there_is_answered_with_those_that_are(kind, tmp_path):
    path = KINDS[kind](tmp_path, [{"picture": "0.png", "long": "a face", "meta": {"age": 3}}])
    with pytest.raises(
        UserError, match=r"data\.sets\[0\]: .*fields\.caption is 'short', but a record has: picture, long"
    ):
        opened(path, fields=FieldMap(caption="short"))
    with pytest.raises(UserError, match=r"no caption, conversation or text is known in .*: picture, long, meta\.age"):
        opened(path)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"data\.sets\[0\]\.path: .* is not there"):
        opened(tmp_path / "none.json")
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(UserError, match=r"data\.sets\[0\]\.kind: cannot tell what .*x\.zip is"):
        opened(tmp_path / "x.zip")
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"x\.parquet is damaged or no parquet"):
        opened(tmp_path / "x.parquet")
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="datasets cannot read"):
        opened(tmp_path / "x", kind="datasets")


@pytest.mark.parametrize("where", ["name of a column", "statistics", "record"])
def test_parquet_whose_words_are_no_text(tmp_path, where):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, damaged = tmp_path / "faces.parquet", b"smile" if where == "name of a column" else b"caption 0"
    table = pa.Table.from_pylist([{**sets.record(0), "smile": "caption 0"}])
    pq.write_table(table, path, compression="none", write_statistics=where == "statistics", store_schema=False)
    content = path.read_bytes()
    assert damaged in content
    path.write_bytes(content.replace(damaged, b"\x80" + damaged[1:]))
    with pytest.raises(UserError, match=r"faces\.parquet.* can't decode byte 0x80"):
        opened(path)


@pytest.mark.parametrize("rows", [-1, 2**62, 10**30])
def test_a_parquet_file_that_claims_impossible_rows_is_refused(rows, tmp_path, monkeypatch):
    path = parquet_of(tmp_path)
    footer_says(monkeypatch, rows)
    with pytest.raises(UserError, match=rf"faces\.parquet is damaged \({rows} rows in a group\)"):
        sets.open_raw(path)


def test_rows_that_a_parquet_file_claims_and_lacks_are_samples_lost(tmp_path, monkeypatch):
    path = parquet_of(tmp_path)
    footer_says(monkeypatch, 5)
    source = sets.open_raw(path)
    assert len(source) == 5 and source[2].key == "face-2"
    with pytest.raises(SampleError, match="row group 0"):
        source[4]


def parquet_of(folder):
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([sets.record(number) for number in range(3)]), folder / "faces.parquet"
    )
    return folder / "faces.parquet"


def footer_says(monkeypatch, rows):
    import pyarrow.parquet as parquet

    class Footer:
        def to_dict(self):
            return {"row_groups": [{"num_rows": rows}]}

    monkeypatch.setattr(parquet, "read_metadata", lambda file: Footer())
