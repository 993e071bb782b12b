"""The cache of features: computed once, whole or not there, mended when damaged, shared by processes, silent."""

import hashlib
import logging
import multiprocessing
import os
import resource
import stat
import warnings

import numpy as np
import pytest
import torch

from unif2ace.encoders import Encoder, FaceCountError, FeatureCache
from unif2ace.errors import UserError


class Toy(Encoder):
    """A feature of a picture is a function of its pixels; a black one has no face."""

    name, channels, licence, fingerprint, batch = "toy", 5, "none", "abc", 3

    def __init__(self, tokens=None):
        self.tokens, self.seen = tokens, []

    def _encode(self, images, first):
        self.seen.append(len(images))
        for number, image in enumerate(images):
            if not image.any():
                raise FaceCountError(first + number, 0)
        means = torch.tensor([[image[..., c].mean() for c in (0, 1, 2, 0, 1)] for image in images])
        vectors = torch.sin(means * torch.arange(1, 6)) / 3
        return vectors if self.tokens is None else vectors[:, None].expand(-1, self.tokens, -1)


def pictures(count, seed=0):
    rng = np.random.RandomState(seed)
    return [rng.randint(1, 256, (4 + n % 3, 5, 3)).astype(np.uint8) for n in range(count)]


def entries(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_each_picture_is_computed_once_and_comes_back_the_same(tmp_path, tokens, dtype):
    toy, images = Toy(tokens), pictures(7)
    first = FeatureCache(tmp_path, dtype)(toy, images[:5])
    assert toy.seen == [3, 2]
    steps = []
    again = FeatureCache(tmp_path, dtype)(toy, images[::-1] + images[:1], steps.append)
    assert toy.seen == [3, 2, 2] and sum(steps) == 8, "what was missing, in one batch"
    assert torch.equal(again.flip(0)[1:6], first) and torch.equal(again[-1], again[6])
    exact = Toy(tokens)(images)
    error = (again[:7].flip(0) - exact).abs().max()
    assert error == 0 if dtype == torch.float32 else 0 < error < 1e-3
    assert again.dtype == torch.float32 and len(entries(tmp_path)) == 7
    assert FeatureCache(tmp_path)(toy, []).shape == exact[:0].shape


def test_twins_in_one_call_are_computed_once(tmp_path):
    toy, (image, other) = Toy(), pictures(2)
    steps = []
    features = FeatureCache(tmp_path)(toy, [image, other, image.copy(), image], steps.append)
    assert toy.seen == [2] and steps == [3, 1]
    assert torch.equal(features[0], features[3]) and not torch.equal(features[0], features[1])


def test_shape_pixels_and_fingerprint_tell_entries_apart(tmp_path):
    cache, toy = FeatureCache(tmp_path), Toy()
    image = pictures(1)[0]
    turned = image.reshape(5, 4, 3)
    changed = image.copy()
    changed[-1, -1, -1] ^= 1
    strided = np.concatenate([image, image], axis=1)[:, : image.shape[1]]
    assert cache.path(toy, strided) == cache.path(toy, image), "pixels, not how they lie"
    other = Toy()
    other.fingerprint = "abd"
    paths = [cache.path(toy, each) for each in (image, turned, changed)] + [cache.path(other, image)]
    paths.append(FeatureCache(tmp_path, torch.float16).path(toy, image))
    assert len(set(paths)) == 5


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "longer", "of another size"])
def test_a_damaged_entry_is_computed_again_and_said(tmp_path, damage):
    toy, images = Toy(), pictures(3)
    cache = FeatureCache(tmp_path)
    first = cache(toy, images)
    path = cache.path(toy, images[1])
    content = bytearray(path.read_bytes())
    content[-3] ^= 16 if damage == "flipped" else 0
    other = hashlib.sha256(content[32:-4]).digest() + content[32:-4]
    kinds = {"cut": content[:-4], "empty": b"", "flipped": content, "longer": content + b"\0", "of another size": other}
    path.write_bytes(kinds[damage])
    with pytest.warns(RuntimeWarning, match="is damaged: computed again") as warned:
        again = cache(toy, images)
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    assert torch.equal(again, first) and toy.seen == [3, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache(toy, images), first)


def test_what_was_computed_before_a_picture_without_a_face_is_kept(tmp_path):
    toy, images = Toy(), pictures(5)
    images.insert(4, np.zeros((4, 4, 3), np.uint8))
    cache = FeatureCache(tmp_path)
    cache(toy, images[:1])
    with pytest.raises(FaceCountError, match=r"images\[4\]: no face") as raised:
        cache(toy, images)
    assert raised.value.index == 4 and len(entries(tmp_path)) == 4


def _fill(folder, start):
    images = pictures(24)
    for shift in range(3):
        FeatureCache(folder)(Toy(), images[start + shift :] + images[: start + shift])


def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, 5 * n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(entries(tmp_path)) == 24, "no partial file is left"
    toy = Toy()
    assert torch.equal(FeatureCache(tmp_path)(toy, pictures(24)), Toy()(pictures(24))) and toy.seen == []


def test_only_the_owner_may_read_an_entry(tmp_path):
    mask = os.umask(0)
    try:
        FeatureCache(tmp_path)(Toy(), pictures(1))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(entries(tmp_path)[0].stat().st_mode) == 0o600


def test_a_full_disk_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*free space"):
            FeatureCache(tmp_path)(Toy(), pictures(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot (read|write)"):
        FeatureCache(tmp_path / "file")(Toy(), pictures(1))


def test_features_are_never_said(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    toy, images, said = Toy(), pictures(3), []
    cache = FeatureCache(tmp_path)
    vectors = cache(toy, images)
    path = cache.path(toy, images[0])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(RuntimeWarning) as warned:
        cache(toy, images)
    with pytest.raises(FaceCountError) as raised:
        cache(toy, [*images, np.zeros((4, 4, 3), np.uint8)])
    said += [repr(cache), repr(toy), repr(raised.value), *(str(each.message) for each in warned), caplog.text]
    said += capfd.readouterr()
    digits = {f"{abs(value):.4f}".lstrip("0") for value in vectors.flatten().tolist()}
    assert len(digits) > 10 and not [each for each in digits if any(each in text for text in said)]


def test_other_dtypes_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="dtype: expected one of"):
        FeatureCache(tmp_path, torch.int8)
