"""Damaged samples in a stream: passed over alike by all, counted once, and in the end named."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil

import pytest
import sets
import streams
from streams import take, whole

from unif2ace.data import base
from unif2ace.data.config import SetConfig
from unif2ace.data.shards import index_path
from unif2ace.data.stream import Stream
from unif2ace.errors import UserError

folder, text, model = streams.folder, streams.text, streams.model  # fixtures


def flip(folder, key) -> str:
    """Damage one sample on disk; what the message will call it."""
    for path in sorted(folder.glob("*.tar")):
        index = json.loads(index_path(path).read_text())
        if key in index["keys"]:
            offset, size, _ = index["places"][index["keys"].index(key)][0]
            with path.open("r+b") as file:
                file.seek(offset + size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 4]))
            return f"{path} at byte {offset}"
    raise KeyError(key)


@pytest.fixture
def damaged(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "damaged")
    return copy, {flip(copy, f"face-{number}") for number in (4, 17)}


def test_damage_is_passed_over_alike_by_all(damaged, folder, text, model, caplog):
    """Others stay in their places, a stand-in has the damaged one's, on any number of ranks and workers, resumed or
    not."""
    copy, wheres = damaged
    data = sets.config(SetConfig(str(copy)), max_corrupt=2)
    sound = take(Stream(sets.config(SetConfig(str(folder))), model, text), 12)
    one = Stream(data, model, text)
    with caplog.at_level(logging.WARNING):
        steps = take(one, 12)
    assert set(one.corrupt) == wheres and len(caplog.records) == 2
    assert all("its bytes are not those that were written" in record.getMessage() for record in caplog.records)
    changed = 0
    for a, b in zip(steps, sound):
        for mine, theirs in zip(a.keys[0], b.keys[0]):
            lost = theirs.endswith(("face-4", "face-17"))
            assert (mine == theirs) != lost
            changed += lost
    assert changed == one.told["stand_in"] > 3, "more than an epoch"
    expected = whole([Stream(data, model, text)], 12)
    assert whole([Stream(data, model, text, rank=rank, ranks=2) for rank in range(2)], 12) == expected
    among = Stream(dataclasses.replace(data, workers=2), model, text)
    first = whole([among], 5)
    rest = Stream(data, model, text)
    rest.load_state_dict(among.state_dict())
    assert first + whole([rest], 7) == expected and set(rest.corrupt) == wheres


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_stops_it_with_the_file_s_name(damaged, text, model, workers):
    copy, wheres = damaged
    stream = Stream(sets.config(SetConfig(str(copy)), max_corrupt=1, workers=workers), model, text)
    with pytest.raises(
        UserError, match=r"2 samples could not be read, data.max_corrupt allows 1; the last: (.*tar at byte .*)"
    ) as e:
        take(stream, 12)
    assert any(where in str(e.value) for where in wheres) and "\n" not in str(e.value)


def test_the_count_goes_on_after_a_resume(damaged, text, model):
    copy, _ = damaged
    data = sets.config(SetConfig(str(copy)), max_corrupt=1)
    stream = Stream(data, model, text)
    while len(stream.corrupt) < 1:
        take(stream, 1)
    again = Stream(data, model, text)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.corrupt == stream.corrupt and len(again.corrupt) == 1
    with pytest.raises(UserError, match="2 samples could not be read"):
        take(again, 12)


def test_a_shard_that_goes_away_stops_it(damaged, text, model):
    copy, _ = damaged
    stream = Stream(sets.config(SetConfig(str(copy)), max_corrupt=6), model, text)
    take(stream, 1)
    for number in range(5):
        (copy / f"shard-{number:05d}.tar").unlink()
    base._opened.cache_clear()  # a file that is open can still be read
    with pytest.raises(UserError, match=r"7 samples could not be read.*shard-0000\d\.tar at byte \d+: No such file"):
        take(stream, 30)


def test_codes_of_another_tokenizer_stop_it(folder, text):
    with pytest.raises(UserError, match=r"its codes are \[4\] up to \d+, this model's are \[9\] below 16"):
        take(Stream(sets.config(SetConfig(str(folder)), max_corrupt=3), sets.model(text).__class__(
            **{**sets.model(text).to_dict(), "image_tokens": 9}), text), 1)  # fmt: skip
