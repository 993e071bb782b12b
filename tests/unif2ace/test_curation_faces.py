"""Face checks: what falls out and why, duplicates by their vectors, going on after a kill."""

from __future__ import annotations

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from toy_source import eight, picture, save, stand_ins  # noqa: F401

from unif2ace.curation import faces as module
from unif2ace.curation.config import FacesConfig, ImagesConfig
from unif2ace.curation.faces import check_faces, picture_files, picture_folder, quality, repeated
from unif2ace.data.dataset import FaceSet


@pytest.fixture
def pictures(tmp_path):
    return eight(tmp_path / "pictures")


@pytest.mark.usefixtures("stand_ins")
def test_face_checks_and_their_reasons(pictures, tmp_path, capsys):
    save(pictures, "z_black.png", np.zeros((160, 160, 3), np.uint8))
    save(pictures, "z_two.png", np.concatenate([picture(True, True, 90), picture(True, False, 91)], 1))
    save(pictures, "z_small.png", picture(True, True, 92)[:100, :100])
    save(pictures, "z_blur.png", cv2.GaussianBlur(picture(True, True, 93), (0, 0), 20))
    save(pictures, "z_dark.png", picture(True, True, 94) // 12)
    save(pictures, "z_white.png", (picture(True, True, 95) // 8 + 222).astype(np.uint8))
    near = (picture(False, False, 0).astype(int) + 3).clip(0, 255).astype(np.uint8)
    save(pictures, "z_twin.png", near)
    shutil.copy(pictures / "face1.png", pictures / "z_copy.png")
    (pictures / "z_text.png").write_text("no picture")
    (pictures / "notes.txt").write_text("not looked at")
    files = picture_files(pictures, 0)
    config = FacesConfig(blur=1.0, same=0.99)
    found = check_faces(pictures, files, config, tmp_path / "work")
    reasons = {each.file: each.reason.partition(":")[0] for each in found}
    assert list(reasons) == files
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "z_black.png": "no face", "z_two.png": "several faces", "z_small.png": "face too small",
        "z_blur.png": "blurred",
        "z_dark.png": "too dark", "z_white.png": "too bright", "z_twin.png": "duplicate", "z_copy.png": "duplicate",
        "z_text.png": "no picture",
    }  # fmt: skip
    assert [path.suffix for path in (tmp_path / "work").iterdir()] == [".json"], "no identity vector is left"
    assert check_faces(pictures, files, config, tmp_path / "work") == found
    loose = check_faces(pictures, files, replace(config, same=1.0, bystanders=True), tmp_path / "work")
    assert {each.file for each in loose if not each.reason} == {*files[:8], "z_two.png", "z_twin.png"}


@pytest.mark.usefixtures("stand_ins")
def test_face_checks_go_on_after_a_kill(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 3)
    files, work, looked = picture_files(pictures, 0), tmp_path / "work", []
    quiet = module.quality

    def counted(face):
        looked.append(1)
        if len(looked) == 5:
            raise KeyboardInterrupt
        return quiet(face)

    monkeypatch.setattr(module, "quality", counted)
    with pytest.raises(KeyboardInterrupt):
        check_faces(pictures, files, FacesConfig(), work)
    (kept,) = work.glob("*.npz")
    assert kept.stat().st_mode & 0o077 == 0, "vectors are their owner's"
    found = check_faces(pictures, files, FacesConfig(), work)
    assert len(found) == 8 and len(looked) == 5 + 5 and not list(work.glob("*.npz"))


@pytest.mark.parametrize("same", [-1.0, 0.2, 0.5, 0.9])
def test_repeated_vectors_are_those_of_the_definition(monkeypatch, same):
    monkeypatch.setattr("unif2ace.curation.faces._BLOCK", 7)
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    vectors[30:40] = vectors[:10] + 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept: list[int] = []
    for row in range(60):
        if not any(vectors[row] @ vectors[other] >= same for other in kept):
            kept.append(row)
    assert np.flatnonzero(~repeated(vectors, same)).tolist() == kept and 0 < len(kept) < 60


def test_quality_of_a_face():
    sharp, soft = picture(True, True, 0), cv2.GaussianBlur(picture(True, True, 0), (0, 0), 4)
    assert quality(sharp)["blur"] > 20 * quality(soft)["blur"]
    assert quality(np.zeros((9, 9, 3), np.uint8)) == {"blur": 0.0, "light": 0.0, "clipped": 1.0}


def test_identity_vectors_of_made_faces_are_no_part_of_the_set(tmp_path, monkeypatch):
    """The card says that the set has none."""

    def made(count, seed, folder, held_out):
        drawn = np.random.default_rng(seed)
        images, vectors = drawn.integers(0, 256, (count, 64, 64, 3), np.uint8), drawn.standard_normal((count, 128))
        found = FaceSet(images, np.zeros((count, 1), int), np.zeros((1, 2)), vectors, held_out, {})
        found.save(folder / "faces.npz")
        return found

    monkeypatch.setattr(module, "build_faces", made)
    out, work = tmp_path / "set", tmp_path / "set" / "work"
    folder, faces = picture_folder(ImagesConfig(synthetic=3), out, work)
    assert [path.name for path in sorted(folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    files = [path for path in out.rglob("*") if path.is_file() and work not in path.parents]
    assert {path.suffix for path in files} == {".png"} and faces is not None
    assert (work / "synthetic" / "faces.npz").is_file()
