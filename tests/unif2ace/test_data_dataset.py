"""The cached face set: its split, and what happens when the cache is damaged, full or made otherwise.

The generator and the encoder are replaced by quick ones here; test_data_faces.py runs the real ones.
"""

import errno

import numpy as np
import pytest
import torch

from unif2ace.data import attributes, dataset
from unif2ace.data.dataset import FaceSet, build_faces
from unif2ace.errors import UserError


def _encode(images, step):
    step(len(images))
    vectors = torch.from_numpy(images.reshape(len(images), -1)[:, :128].astype(np.float32) + 1)
    return torch.nn.functional.normalize(vectors, dim=1)


@pytest.fixture
def made(monkeypatch):
    """Quick stand-ins; the list holds one entry for each time that faces were really made."""
    calls = []

    def generate(count, seed, psi, threads, progress):
        calls.append((count, seed, psi))
        return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)

    monkeypatch.setattr(dataset, "generate_faces", generate)
    monkeypatch.setattr(dataset.identity, "face_encoder", lambda: _encode)
    return calls


def build(folder, **settings):
    settings = {"count": 40, "seed": 0, "held_out": 10, "progress": False, **settings}
    return build_faces(settings.pop("count"), settings.pop("seed"), folder, **settings)


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("images", "classes", "thresholds", "identity"))


def test_split_is_disjoint_and_thresholds_never_saw_the_held_out(tmp_path, made):
    faces = build(tmp_path)
    assert len(faces.test) == 10 and sorted([*faces.train, *faces.test]) == list(range(40))
    expected = attributes.fit_thresholds(attributes.measure(faces.images[faces.train]))
    assert np.array_equal(faces.thresholds, expected)
    assert not np.array_equal(faces.thresholds, attributes.fit_thresholds(attributes.measure(faces.images)))
    assert np.array_equal(faces.classify(faces.images), faces.classes)
    assert np.allclose(np.linalg.norm(faces.identity, axis=1), 1, atol=1e-5)


def test_second_time_comes_from_the_cache(tmp_path, made):
    first, second = build(tmp_path), build(tmp_path)
    assert len(made) == 1 and same(first, second)
    assert [path.name for path in tmp_path.iterdir()] == ["faces.npz"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"count": 41}, {"psi": 0.5}, {"held_out": 11}])
def test_other_settings_are_made_anew(tmp_path, made, capsys, other):
    build(tmp_path)
    build(tmp_path, **other)
    assert len(made) == 2 and "other settings" in capsys.readouterr().out


def test_another_version_is_made_anew(tmp_path, made, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(dataset, "VERSION", dataset.VERSION + 1)
    build(tmp_path)
    assert len(made) == 2


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_truncated_cache_is_made_anew(tmp_path, made, capsys, keep):
    first = build(tmp_path)
    path = tmp_path / "faces.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="faces.npz is damaged"):
        FaceSet.load(path)
    assert same(build(tmp_path), first)
    assert len(made) == 2 and "is damaged; making it again" in capsys.readouterr().out


def test_flipped_bytes_are_noticed(tmp_path, made):
    build(tmp_path)
    path = tmp_path / "faces.npz"
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        FaceSet.load(path)


def test_full_disk_leaves_the_old_file(tmp_path, made, monkeypatch):
    build(tmp_path)
    before = (tmp_path / "faces.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset.np, "savez", full)
    with pytest.raises(UserError, match="cannot write .*faces.npz: No space left on device"):
        build(tmp_path, seed=1)
    assert (tmp_path / "faces.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["faces.npz"]


def test_interrupt_leaves_nothing_half_written(tmp_path, made, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset.np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_cache(tmp_path, made):
    (tmp_path / "faces.npz").mkdir()
    with pytest.raises(UserError, match="cannot read .*faces.npz"):
        build(tmp_path)
    assert not made


def test_unwritable_folder_is_reported_before_the_work(tmp_path, made):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        build(tmp_path / "file")
    assert not made


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        FaceSet.load(tmp_path / "none.npz")


@pytest.mark.parametrize("held_out", [0, 40, 41])
def test_bad_held_out(tmp_path, held_out):
    with pytest.raises(ValueError, match="held_out: expected"):
        build(tmp_path, held_out=held_out)
