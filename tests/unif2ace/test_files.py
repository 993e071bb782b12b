"""Files that are whole or not there, whatever goes wrong while they are written."""

import errno
import os
import types

import pytest

from unif2ace.errors import UserError
from unif2ace.files import digest, read_json, replacing, write_json


def test_the_file_appears_with_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with replacing(path) as partial:
        partial.write_text("new")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_inside_leaves_the_old_file_and_passes_through(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, replacing(path) as partial:
        partial.write_text("half of the n")
        raise error
    assert raised.value is error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*file\.txt: No space left on device"), replacing(path) as part:
        part.write_text("half of the n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_file_in_the_place_of_the_folder_is_the_users_to_mend(tmp_path):
    (tmp_path / "taken").write_text("a file")
    for path in (tmp_path / "taken" / "file.txt", tmp_path / "taken" / "deeper" / "file.txt"):
        with pytest.raises(UserError, match="cannot write"), replacing(path) as partial:
            partial.write_text("never")


def test_a_folder_in_the_place_of_the_file_is_the_users_to_mend(tmp_path):
    (tmp_path / "folder" / "kept").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "folder") as partial:
        partial.write_text("never")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["kept"]


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_file_name_is_the_users_to_mend(path):
    with pytest.raises(UserError, match="file"), replacing(path):
        pass


def test_json_comes_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == value and os.listdir(tmp_path) == ["x.json"]


NESTED, DIGITS = b"[" * 100_000 + b"]" * 100_000, b"9" * 5000  # what Python's reader refuses with other errors


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": ', b"\xff\xfe\x00", b"{'a': 1}", NESTED, DIGITS],
    ids=["empty", "cut", "not UTF-8", "not JSON", "nested", "digits"],
)
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        read_json(path)


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.json is missing"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path)


def test_digest_hangs_on_every_part_and_on_where_it_ends(tmp_path):
    module = types.ModuleType("made_up")
    module.__file__ = str(tmp_path / "made_up.py")
    (tmp_path / "made_up.py").write_text("a = 1\n")
    names = [digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"abc", module)]
    (tmp_path / "made_up.py").write_text("a = 2\n")
    names.append(digest(b"abc", module))
    assert len(set(names)) == len(names) and names[0] == digest(b"ab", b"c")
