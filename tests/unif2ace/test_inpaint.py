"""Painting a part of a face anew: what is kept, what is painted, what is shown on the way."""

import numpy as np
import pytest
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.framing import bring_mask, framed
from unif2ace.errors import UserError
from unif2ace.generation.image import PaintSettings, paint, paint_codes, repaint
from unif2ace.generation.masks import blended, box_mask, image_mask, touched
from unif2ace.model.image_tokenizer import to_images, to_uint8

SIDE, GRID = 64, 8


@pytest.fixture(scope="module")
def checkpoint(untrained):
    return Checkpoint.load(untrained)


@pytest.fixture(scope="module")
def faces(checkpoint):
    return paint(checkpoint, ["dark hair", "light hair"], PaintSettings(steps=2, seed=9))


def boxes(*corners):
    return np.stack([box_mask(each, SIDE, SIDE) for each in corners])


def test_known_codes_stay_and_the_others_are_painted(checkpoint):
    torch.manual_seed(0)
    known = torch.randint(16, (3, GRID * GRID))
    known[torch.rand(known.shape) < 0.4] = -1
    known[2] = -1
    steps = []
    text = checkpoint.text_tokenizer
    ids = [text.encode(prompt) for prompt in ("dark hair", "light hair", "dark hair")]
    codes = paint_codes(checkpoint.model, ids, text.end, PaintSettings(steps=4), steps.append, known)
    assert torch.equal(codes[known >= 0], known[known >= 0])
    assert codes.min() >= 0 and codes.max() < 16
    first = checkpoint.model.config.vocabulary.code_range[0]
    for step in steps:
        assert torch.equal(step.ids[known >= 0] - first, known[known >= 0])
        assert torch.equal(step.sample[known >= 0] - first, known[known >= 0])


def test_what_is_known_is_seen(checkpoint):
    """The same masked places and seed, other codes around them: another painting."""
    text, ids = checkpoint.text_tokenizer, checkpoint.text_tokenizer.encode("dark hair")
    model = checkpoint.model
    known = torch.arange(GRID * GRID)[None] % 16
    known[:, ::2] = -1
    other = torch.where(known >= 0, (known + 5) % 16, known)
    hidden = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach().clone()))
    for each in (known, other):
        paint_codes(model, [ids], text.end, PaintSettings(steps=1, guidance=0.0), known=each)
    hook.remove()
    assert not torch.equal(hidden[0], hidden[-1])


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_mask_of_everything_is_plain_painting(checkpoint, faces, guidance):
    prompts, settings = ["light hair", "light hair"], PaintSettings(steps=4, seed=3, guidance=guidance)
    whole = repaint(checkpoint, faces, np.ones((2, SIDE, SIDE), bool), prompts, settings)
    assert np.array_equal(whole, paint(checkpoint, prompts, settings))
    every_token = np.zeros((2, SIDE, SIDE), bool)
    every_token[:, ::8, ::8] = True
    text = checkpoint.text_tokenizer
    codes = paint_codes(checkpoint.model, [text.encode(each) for each in prompts], text.end, settings)
    assert touched(every_token[0], GRID).all()
    anew = repaint(checkpoint, faces, every_token, prompts, settings)
    assert np.array_equal(whole, to_uint8(checkpoint.image_tokenizer.decode(codes)).numpy())
    assert np.array_equal(anew[~every_token], faces[~every_token])


def test_pixels_outside_the_mask_are_the_pictures_own(checkpoint, faces):
    masks = boxes((5, 9, 30, 33), (40, 0, 64, 64))
    anew = repaint(checkpoint, faces, masks, ["dark hair"] * 2, PaintSettings(steps=3))
    assert np.array_equal(anew[~masks], faces[~masks])
    assert (anew != faces)[masks].any()


def test_only_tokens_that_the_mask_touches_are_painted(checkpoint, faces, monkeypatch):
    seen = []

    def codes(model, captions, end, settings, on_step, known):
        seen.append(known)
        return known.clamp(min=0)

    monkeypatch.setattr("unif2ace.generation.image.paint_codes", codes)
    masks = boxes((7, 8, 9, 16), (63, 63, 64, 64))
    repaint(checkpoint, faces, masks, ["dark hair"] * 2, PaintSettings(steps=1))
    held, _ = checkpoint.image_tokenizer.encode(to_images(torch.from_numpy(faces)))
    open_tokens = [(seen[0][row] < 0).nonzero().flatten().tolist() for row in range(2)]
    assert open_tokens == [[8, 9], [63]]
    assert torch.equal(seen[0][seen[0] >= 0], held[seen[0] >= 0])


def test_every_step_is_shown(checkpoint, faces):
    shown, masks = [], boxes((8, 8, 40, 40), (0, 0, 64, 64))
    whole = repaint(checkpoint, faces, masks, ["dark hair"] * 2, PaintSettings(steps=4), shown.append)
    assert [each.index for each in shown] == list(range(len(shown))) and shown[0].steps == 4
    assert all(each.images.shape == faces.shape and each.images.dtype == np.uint8 for each in shown)
    assert all(np.array_equal(each.images[~masks], faces[~masks]) for each in shown)
    assert np.array_equal(shown[-1].images, whole)  # nothing is left to decide
    painted = []
    whole = paint(checkpoint, ["dark hair"], PaintSettings(steps=4), painted.append)
    assert np.array_equal(painted[-1].images, whole)
    patches = painted[0].images[0].reshape(GRID, 8, GRID, 8, 3)
    undecided = (patches.min(axis=(1, 3, 4)) >= 96) & (patches.max(axis=(1, 3, 4)) < 160)
    assert undecided.sum() >= GRID * GRID // 2 and len(painted) > 1


def test_the_blend_lies_inside_the_mask():
    kept, painted = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE, 3), 200, np.uint8)
    mask = box_mask((16, 16, 48, 64), SIDE, SIDE)
    picture = blended(kept, painted, mask)[..., 0]
    assert (picture[~mask] == 0).all() and (picture[24:64, 24:40] == 200).all()
    assert (np.diff(picture[32, 16:24].astype(int)) >= 0).all() and 0 < picture[32, 16] < 200
    assert (picture[63, 24:40] == 200).all()  # the picture's own edge is no border
    assert np.array_equal(blended(kept, painted, np.ones_like(mask)), painted)
    assert np.array_equal(blended(kept, painted, np.zeros_like(mask)), kept)


def test_masks():
    assert box_mask((-5, 2, 3, 400), 8, 8).sum() == 3 * 6
    assert image_mask(np.full((4, 5, 3), 200, np.uint8), 4, 5).all()
    for wrong in ((8, 0, 9, 4), (3, 3, 3, 5), (4, 4, 2, 2)):
        with pytest.raises(UserError, match="nothing of it"):
            box_mask(wrong, 8, 8)
    with pytest.raises(UserError, match="expected the picture's size, 5 x 4 pixels, got 4 x 5"):
        image_mask(np.full((5, 4, 3), 200, np.uint8), 4, 5)
    grid = touched(box_mask((7, 0, 9, 1), 32, 32), 4)
    assert grid.nonzero()[0].tolist() == [0, 1]


def test_pictures_are_framed(monkeypatch):
    rng = np.random.default_rng(0)
    own = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    assert framed(own, SIDE).face is own
    wide = rng.integers(0, 255, (100, 200, 3), dtype=np.uint8)
    frame = framed(wide, SIDE, crop=False)
    assert frame.face.shape == (SIDE, SIDE, 3) and frame.size == (100, 200)
    mask = np.zeros((100, 200), bool)
    mask[:, :50] = True
    with pytest.raises(UserError, match="nothing of what is to be painted"):
        bring_mask(frame, mask)
    mask[:, :75] = True
    assert bring_mask(frame, mask)[:, :15].all() and not bring_mask(frame, mask)[:, 18:].any()
    for count, words in ((0, "no face found in the picture"), (2, "2 faces found in the picture")):
        monkeypatch.setattr("unif2ace.data.framing.clear_faces", lambda image, count=count: np.zeros((count, 5, 2)))
        with pytest.raises(UserError, match=words):
            framed(wide, SIDE)
