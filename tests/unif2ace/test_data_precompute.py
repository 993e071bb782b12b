"""Precomputing: the same bytes however it is done, killed or not; what it stops for, and what it says."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import sets
import torch
from quick import CountedEncoding, DyingEncoding, PickyEncoding, QuickEncoding, job

from unif2ace.cli import main
from unif2ace.data import precompute as module
from unif2ace.data import shards
from unif2ace.data.config import SetConfig
from unif2ace.data.encode import EncodingConfig, load_image_tokenizer
from unif2ace.data.precompute import PrecomputeConfig, precompute
from unif2ace.data.shards import ShardSource
from unif2ace.data.sources import open_source
from unif2ace.errors import UserError

COUNT = 23


def made(*arguments, **changes):
    return precompute(job(*arguments, **changes), progress=False)


def content(out: Path) -> dict[str, str]:
    """Every file but the lock, by its digest."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.name != ".lock"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return sets.llava(tmp_path_factory.mktemp("raw"), COUNT)


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory):
    """What comes of it when nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed")
    made(raw, out)
    return content(out)


def test_the_manifest_says_what_is_there(raw, tmp_path):
    manifest = made(raw, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert manifest["samples"] == COUNT and manifest["skipped"] == {"corrupt": 0, "unusable": 0}
    assert [each["samples"] for each in manifest["shards"]] == [5, 5, 5, 5, 3]
    for each in manifest["shards"]:
        file = tmp_path / "out" / each["file"]
        assert file.stat().st_size == each["bytes"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == each["sha256"]
    assert (
        manifest["job"]["encoding"]["tokenizer"] == "quick" and manifest["job"]["encoding"]["semantic"] == "tokenizer"
    )
    assert [each.key for each in ShardSource(tmp_path / "out")] == [f"face-{number}" for number in range(COUNT)]


def test_the_number_of_processes_changes_no_byte(raw, undisturbed, tmp_path):
    made(raw, tmp_path, processes=2)
    assert content(tmp_path) == undisturbed


def test_processes_are_numbered_and_go_over_the_gpus(raw, tmp_path, monkeypatch):
    built = tmp_path / "built"
    built.mkdir()
    made(raw, tmp_path / "out", CountedEncoding(folder=str(built)), processes=3)
    assert {each.name for each in built.iterdir()} == {"0", "1", "2"}  # and the one that shares the work out: nothing

    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    spread = EncodingConfig("", identity="sface", device="cuda")
    assert [spread.of_process(each).device for each in range(5)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert spread.of_process(1) == EncodingConfig("", identity="sface", device="cuda:1")
    for device in ("cpu", "cuda:1"):
        assert EncodingConfig("", device=device).of_process(3) == EncodingConfig("", device=device)


def test_done_is_done(raw, undisturbed, tmp_path, monkeypatch):
    made(raw, tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}
    monkeypatch.setattr(module, "write_shard", None)
    assert made(raw, tmp_path)["samples"] == COUNT
    assert times == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".lock"}


def test_what_is_missing_or_cut_is_made_again(raw, undisturbed, tmp_path):
    made(raw, tmp_path)
    (tmp_path / "shard-00001.tar").unlink()
    (tmp_path / "shard-00002.json").unlink()
    os.truncate(tmp_path / "shard-00003.tar", 2000)
    (tmp_path / ".shard-00004.tar.99.partial").write_bytes(b"left over")
    made(raw, tmp_path)
    assert content(tmp_path) == undisturbed


def _slow(raw, out):
    precompute(job(raw, out, QuickEncoding(seconds=0.004)), progress=False)


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(raw, undisturbed, tmp_path, kills):
    """Processes die of SIGKILL after random times; no gap, no double, the bytes of an undisturbed run."""
    out, died, delays = tmp_path / "out", 0, iter((7919 * n % 97) / 97 for n in range(1, 1000))
    while died < kills:
        process = multiprocessing.get_context("fork").Process(target=_slow, args=(raw, out))
        process.start()
        time.sleep(0.02 + 0.25 * next(delays))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        died += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it was done before: from the start again
            assert content(out) == undisturbed
            for path in out.iterdir():
                path.unlink()
    made(raw, out, QuickEncoding(seconds=0.0))
    assert content(out) == undisturbed


def test_a_lost_process_is_reported(raw, tmp_path):
    with pytest.raises(UserError, match="a process was lost.*run it again to go on"):
        made(raw, tmp_path, DyingEncoding(parent=os.getpid()), processes=2)


def test_full_disk(raw, undisturbed, tmp_path, monkeypatch):
    """The shards before stay, nothing half-written does, and it goes on when there is room."""
    written, addfile = [], shards.tarfile.TarFile.addfile

    def full(self, info, file):
        written.append(info.name)
        if len(written) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        addfile(self, info, file)

    with monkeypatch.context() as patch:
        patch.setattr(shards.tarfile.TarFile, "addfile", full)
        with pytest.raises(UserError, match=r"cannot write .*shard-00001\.tar: No space left on device"):
            made(raw, tmp_path)
    assert sorted(content(tmp_path)) == ["job.json", "shard-00000.json", "shard-00000.tar"]
    made(raw, tmp_path)
    assert content(tmp_path) == undisturbed


def broken(folder: Path, *numbers: int) -> Path:
    path = sets.llava(folder, COUNT)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(b"broken")
    return path


def test_damage_is_passed_over_and_counted(tmp_path):
    path = broken(tmp_path / "raw", 3, 11)
    (tmp_path / "raw" / "4.png").unlink()
    for processes in (1, 2):
        manifest = made(path, tmp_path / f"out{processes}", processes=processes, max_corrupt=3)
        assert manifest["skipped"] == {"corrupt": 3, "unusable": 0} and manifest["samples"] == COUNT - 3
    assert content(tmp_path / "out1") == content(tmp_path / "out2")
    index = json.loads((tmp_path / "out1" / "shard-00000.json").read_text())
    assert index["keys"] == ["face-0", "face-1", "face-2"]
    assert [reason.partition(":")[0] for _, reason, _ in index["skipped"]] == [
        "it is not a picture that can be read",
        "No such file or directory",
    ]
    kept = [number for number in range(COUNT) if number not in (3, 4, 11)]
    read = ShardSource(tmp_path / "out1")
    encoding, source = QuickEncoding().build(), sets.open_raw(path)
    assert [each.key for each in read] == [f"face-{number}" for number in kept]
    assert all((each.codes == encoding(source[number]).codes).all() for number, each in zip(kept, read))


def test_a_shard_of_which_nothing_is_left(tmp_path):
    out = tmp_path / "out"
    manifest = made(broken(tmp_path / "raw", *range(5, 10)), out)
    assert [each["samples"] for each in manifest["shards"]] == [5, 0, 5, 5, 3]
    read = ShardSource(out)
    assert [each.key for each in read] == [f"face-{number}" for number in range(COUNT) if not 5 <= number < 10]
    assert read.serving("t2i").tolist() == list(range(COUNT - 5))


def test_damage_that_is_met_on_opening_counts_too(tmp_path):
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            for name, content in (("png", sets.png(sets.picture(number))), ("txt", b"a face")):
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    with path.open("r+b") as file:
        file.seek(end)
        file.write(b"?" * 512)
    assert made(path, tmp_path / "out")["skipped"] == {"corrupt": 1, "unusable": 0}
    with pytest.raises(UserError, match="1 samples could not be read, max_corrupt allows 0"):
        made(path, tmp_path / "out0", max_corrupt=0)


def test_too_much_damage_stops_it_and_mended_it_goes_on(tmp_path, raw, undisturbed):
    path = broken(tmp_path / "raw", 3, 11, 12)
    with pytest.raises(
        UserError, match=r"3 samples could not be read, max_corrupt allows 2; the last: .*/12\.png: it is"
    ):
        made(path, tmp_path / "out", max_corrupt=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    sets.llava(tmp_path / "raw", COUNT)
    assert made(path, tmp_path / "out", max_corrupt=2)["skipped"]["corrupt"] == 0
    assert content(tmp_path / "out") == undisturbed


def test_what_has_no_face_is_no_damage(raw, tmp_path):
    manifest = made(raw, tmp_path, PickyEncoding(), max_corrupt=0)
    assert manifest["skipped"]["corrupt"] == 0 and 0 < manifest["skipped"]["unusable"] < COUNT
    assert manifest["samples"] + manifest["skipped"]["unusable"] == COUNT


@pytest.mark.parametrize(
    "change, key",
    [({"shard": 6}, "shard"), ({"batch": 3}, "batch"), ({"encoding": QuickEncoding(name="x")}, "encoding")],
)
def test_shards_made_otherwise_are_not_gone_on_with(raw, tmp_path, change, key):
    made(raw, tmp_path)
    with pytest.raises(UserError, match=f"holds shards made with another {key}"):
        made(raw, tmp_path, **change)


def test_two_at_once(raw, tmp_path):
    holds = "import pathlib, sys, unif2ace.files\nwith unif2ace.files.alone_in(pathlib.Path(sys.argv[1])):\n"
    told = [sys.executable, "-c", f"{holds}    print(flush=True), input()", tmp_path]
    with subprocess.Popen(told, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="is held by another process"):
            made(raw, tmp_path)
        other.kill()
    made(raw, tmp_path)


@pytest.mark.parametrize("change", [{"shard": 0}, {"batch": 0}, {"processes": 0}, {"max_corrupt": -1}])
def test_bad_settings(raw, tmp_path, change):
    (key,) = change
    with pytest.raises(UserError, match=rf"precompute\.{key}: expected at least"):
        made(raw, tmp_path, **change)
    with pytest.raises(UserError, match=r"encoding\.frame: expected one of face, square, got 'x'"):
        precompute(PrecomputeConfig(SetConfig(str(raw)), EncodingConfig("", frame="x"), str(tmp_path)))
    with pytest.raises(UserError, match=r"encoding\.semantic: expected image_tokenizer, .* got 'tokenizer'"):
        precompute(PrecomputeConfig(SetConfig(str(raw)), EncodingConfig("", semantic="tokenizer"), str(tmp_path)))
    with pytest.raises(UserError, match=r"encoding\.device: expected a device that torch has here, .* got 'tpu'"):
        precompute(PrecomputeConfig(SetConfig(str(raw)), EncodingConfig("", device="tpu"), str(tmp_path)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A real image tokenizer, alone in its folder as an import is."""
    return sets.saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_command(raw, tokenizer, tmp_path, capsys):
    folder, module_ = tokenizer
    config = tmp_path / "c.yaml"
    config.write_text(
        f"set: {{path: {raw}}}\nencoding: {{tokenizer: {folder}, semantic: image_tokenizer, frame: square}}\n"
    )
    assert main(["precompute", str(config), f"--out={tmp_path / 'out'}", "--shard=10"]) == 0
    assert "23 samples in 3 shards; passed over: 0 that could not be read" in capsys.readouterr().out
    source = open_source(SetConfig(str(tmp_path / "out")), "set")
    assert len(source) == COUNT and source[0].codes.shape == (module_.config.grid**2,)
    assert source[0].semantic.shape == (module_.config.grid**2, module_.config.bits)
    assert main(["precompute", str(config), "--shrad=10"]) == 1
    assert "shrad: there is no such key; did you mean shard?" in capsys.readouterr().err


def test_a_job_is_described_without_the_device_that_does_it(tokenizer, monkeypatch):
    here = EncodingConfig(str(tokenizer[0]), semantic="image_tokenizer", frame="square")
    there = dataclasses.replace(here, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert there.describe() == here.build().describe()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"encoding\.device: expected a device that torch has here, .* got 'cuda:1'"):
        there.describe()


def test_an_image_tokenizer_that_is_not_there(tokenizer, tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        load_image_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no image tokenizer"):
        load_image_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text((tokenizer[0] / "config.json").read_text())
    with pytest.raises(UserError, match="its image tokenizer cannot be read"):
        load_image_tokenizer(tmp_path)


def test_ctrl_c_in_the_command_leaves_what_is_done(raw, undisturbed, tmp_path):
    """A real Ctrl-C to a real process."""
    code = (
        "import signal, sys; sys.path.insert(0, sys.argv[1]); import quick; from pathlib import Path;"
        "from unif2ace.data.precompute import precompute;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored where the tests run in the background
        "precompute(quick.job(Path(sys.argv[2]), Path(sys.argv[3]), quick.QuickEncoding(seconds=0.05)), progress=False)"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(raw), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not (out / "shard-00001.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0 and not list(out.glob(".*.partial"))
    assert not (out / "manifest.json").exists()
    made(raw, out)
    assert content(out) == undisturbed
