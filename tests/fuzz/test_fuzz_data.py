"""Sets of samples and result files, damaged: the whole set is refused, or the sample that is hurt; nothing else."""

from __future__ import annotations

import functools
import io
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

for needed in ("cv2", "PIL", "pyarrow", "transformers"):
    pytest.importorskip(needed, reason=f"needs {needed}")

import numpy as np  # noqa: E402
from damage import NESTED, bounded, damaged, strange_json  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "unif2ace"))  # the small sets of its tests

import pyarrow  # noqa: E402
import pyarrow.parquet as parquet  # noqa: E402
import sets  # noqa: E402

from benchmarks import compare, results  # noqa: E402
from unif2ace.attributes.labels import LabelsConfig, read_labels  # noqa: E402
from unif2ace.data.samples import SampleError  # noqa: E402
from unif2ace.errors import UserError  # noqa: E402

SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz"))


@pytest.fixture(scope="module", autouse=True)
def _scratch():
    SCRATCH.mkdir(exist_ok=True)
    yield
    shutil.rmtree(SCRATCH)


def put(content: bytes, name: str) -> Path:
    path = SCRATCH / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def survives(path: Path) -> None:
    """The set opens or is refused; each of its samples is one, or is told to be none."""
    with bounded():
        try:
            source = sets.open_raw(path)
            for index in range(min(len(source), 5)):
                try:
                    sample = source[index]
                    assert isinstance(sample.captions, tuple) and isinstance(sample.key, str)
                    if sample.image is not None:
                        sample.pixels()
                except SampleError as error:
                    assert error.where and error.reason
        except UserError as error:
            assert str(error)


RECORDS = [sets.record(number) for number in range(3)]


@given(st.data(), st.booleans())
def test_llava(data, lines):
    whole = "\n".join(map(json.dumps, RECORDS)) if lines else json.dumps(RECORDS)
    content = data.draw(damaged(whole.encode()))
    if data.draw(st.booleans()):
        content = data.draw(strange_json(RECORDS[0] if lines else RECORDS))
    put(sets.png(sets.picture(1)), "llava/1.png")
    survives(put(content, f"llava/faces.json{'l' * lines}"))


@pytest.mark.parametrize("name", ["faces.json", "faces.jsonl"])
def test_llava_without_end(name):
    survives(
        put(b"[" + NESTED + b"]" if name.endswith("json") else json.dumps(RECORDS[0]).encode() + b"\n" + NESTED, name)
    )


@functools.cache
def table() -> bytes:
    file = io.BytesIO()
    records = [{**each, "image": sets.png(sets.picture(number))} for number, each in enumerate(RECORDS)]
    parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


@given(st.data())
def test_parquet(data):
    survives(put(data.draw(damaged(table())), "faces.parquet"))


@functools.cache
def shards() -> dict[str, bytes]:
    folder = sets.shards(SCRATCH / "made", 3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(st.data())
def test_shards(data):
    name = data.draw(st.sampled_from(sorted(shards())))
    content = damaged(shards()[name])
    if name.endswith(".json"):
        content |= strange_json(json.loads(shards()[name]))
    folder = SCRATCH / "shards"
    shutil.rmtree(folder, ignore_errors=True)
    for each, own in shards().items():
        put(data.draw(content) if each == name else own, f"shards/{each}")
    survives(folder)


@given(st.data())
def test_shards_of_others(data):
    name = next(each for each in sorted(shards()) if each.endswith(".tar"))
    survives(put(data.draw(damaged(shards()[name])), "others/some.tar"))


@functools.cache
def with_arrays() -> bytes:
    """A tar file of another's, whose arrays nothing but their own headers describes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(2):
            array = io.BytesIO()
            np.save(array, np.arange(6, dtype=np.uint16).reshape(2, 3))
            for name, content in (("txt", b"a face"), ("codes.npy", array.getvalue())):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@given(st.data())
def test_arrays_of_others(data):
    place = data.draw(st.sampled_from([0, 1024, 1536, 2048, 2560]))  # headers of members, and of arrays
    hurt = data.draw(damaged(with_arrays()[place : place + 512]))
    survives(put(with_arrays()[:place] + hurt + with_arrays()[place + 512 :], "others/arrays.tar"))


CELEBV = {
    "meta_info": {"appearance_mapping": ["blurry"], "action_mapping": ["blow"]},
    "clips": {"a": {"ytb_id": "x", "attributes": {"appearance": [1], "action": [0],
                                                  "emotion": {"sep_flag": False, "labels": "neutral"}}}},
}  # fmt: skip
LABELS = {
    "list_attr.txt": b"2\nSmiling Male\n1.jpg 1 -1\n2.jpg -1 -1\n",
    "info.json": json.dumps(CELEBV).encode(),
    "labels.csv": b"image,smiling,age\n1.png,1,old\n2.png,0,young\n",
    "labels.jsonl": b'{"image": "1.png", "smiling": 1}\n{"image": "2.png", "smiling": null}\n',
}


@given(st.data(), st.sampled_from(sorted(LABELS)))
def test_labels(data, name):
    content = damaged(LABELS[name])
    if name.endswith(".json"):
        content |= strange_json(CELEBV)
    if name.endswith(".jsonl"):
        content |= strange_json({"image": "1.png", "smiling": 1, "age": "old"})
    path = put(data.draw(content), f"labels/{name}")
    with bounded():
        try:
            labels = read_labels(LabelsConfig(str(path)))
            assert len(labels.names) == len(labels.groups) == len(labels.values)
        except UserError as error:
            assert str(error) and "\n" not in str(error)


RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "demo.jsonl"


@given(st.data())
def test_results(data):
    lines = RESULT.read_bytes().splitlines()[:4]
    content = data.draw(damaged(b"\n".join(lines)) | strange_json(json.loads(lines[0])))
    path = put(content, "results/x.jsonl")
    with bounded():
        for read in (compare.load, lambda path: results.load(path.parent)):
            try:
                read(path)
            except ValueError as error:
                assert str(path) in str(error)
