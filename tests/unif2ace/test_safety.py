"""What is saved says that a model painted it; and a safety checker is asked before and after."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from unif2ace.errors import UserError
from unif2ace.safety import watermark
from unif2ace.safety.checker import BLANK, allow, blank, load_checker
from unif2ace.safety.saving import NOTICE, REPAINTED, can_write, save


def pictures(count, side, seed=0):
    """Pictures whose spectrum falls as photographs' do, 1 / f, in colours that go together."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    frequency[0, 0] = np.inf
    for _ in range(count):
        grey, tint = (np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency).real for _ in range(2))
        colours = np.stack([grey + 0.3 * tint, grey, grey - 0.3 * tint], axis=2)
        yield np.clip(128 + colours * (40 / colours.std()), 0, 255).astype(np.uint8)


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file))


def psnr(image, other):
    return 10 * np.log10(255**2 / ((image - other.astype(float)) ** 2).mean())


@pytest.mark.parametrize("side,count,least,mean", [(64, 100, 32, 34), (256, 8, 43, 45), (512, 3, 43, 45)])
def test_the_mark_outlives_jpeg_90_and_is_not_seen(side, count, least, mean):
    """A small picture of strong texture takes the strongest mark, and hides it best."""
    seen = []
    for image in pictures(count, side):
        marked = watermark.mark(image)
        assert marked.shape == image.shape and marked.dtype == np.uint8
        assert watermark.detect(marked).found and watermark.detect(jpeg(marked, 90)).found
        seen.append(psnr(image, marked))
    assert min(seen) > least and np.mean(seen) > mean


def test_a_picture_without_the_mark_carries_none():
    """Scores on the picture's own grid are normal; the search of all shifts is held to a bound for 4096 of them."""
    scores = [watermark.detect(each) for side in (64, 72, 150) for each in pictures(15, side, seed=side)]
    assert not any(each.found for each in scores)
    assert max(each.score for each in scores) < 6
    own = np.array([watermark._correlation(each) for each in pictures(300, 64, seed=1)])
    assert abs(own.mean()) < 0.4 and 0.7 < own.std() < 1.3 and abs(own).max() < 4.5


@pytest.mark.parametrize("image", [np.zeros((64, 64, 3)), np.full((64, 64, 3), 255), np.indices((64, 64)).sum(0)])
def test_plain_pictures(image):
    image = np.broadcast_to(image if image.ndim == 3 else image[..., None], (64, 64, 3)).astype(np.uint8)
    assert not watermark.detect(image).found
    assert watermark.detect(jpeg(watermark.mark(image), 90)).found


def test_a_cropped_picture_still_carries_it():
    (image,) = pictures(1, 256)
    marked = watermark.mark(image)
    for part in (marked[13:-30, 27:-5], marked[40:, :210], marked[3:230, 41:]):
        found = watermark.detect(jpeg(part, 90))
        assert found.found and found.threshold == watermark.SHIFTED


def test_one_face_cut_from_a_sheet_carries_it():
    sheet = np.concatenate(list(pictures(4, 64)), axis=1)
    marked = watermark.mark(sheet)
    assert all(watermark.detect(marked[:, 64 * i : 64 * (i + 1)]).score > 4 for i in range(4))
    assert watermark.detect(marked[:, 64:192]).found


def test_hard_edges_do_not_drown_the_mark():
    """A quarter of black and white dots in a calm picture: its large coefficients count no more than any others."""
    rng = np.random.default_rng(0)
    image = np.full((64, 64, 3), 120, np.uint8)
    image[:32, :32] = 255 * rng.integers(0, 2, (32, 32, 1), dtype=np.uint8)
    marked = watermark.mark(image)
    assert watermark.detect(jpeg(marked, 90)).found and np.abs(marked[32:].astype(int) - 120).mean() < 3


def test_the_mark_is_weaker_where_a_picture_is_larger():
    """The weakest that suffices: a large picture repeats the pattern."""
    (small,), (large,) = pictures(1, 64), pictures(1, 512)
    assert psnr(large, watermark.mark(large)) > psnr(small, watermark.mark(small)) + 1


def test_a_picture_too_small_to_carry_it_is_not_said_to():
    (image,) = pictures(1, 16)
    assert not watermark.detect(watermark.mark(image)).found
    assert watermark.mark(image[:5]).shape == (5, 16, 3)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_a_mark_needs_a_colour_picture(image):
    for function in (watermark.mark, watermark.detect):
        with pytest.raises(ValueError, match="image: expected uint8"):
            function(image)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg"])
def test_a_saved_painting_is_marked_and_says_what_it_is(tmp_path, name):
    (image,) = pictures(1, 64)
    assert save(tmp_path / name, image, {"Prompt": "dark hair, ünï"}) is True
    read = Image.open(tmp_path / name)
    assert read.size == (64, 64) and read.mode == "RGB"
    assert watermark.detect(np.asarray(read)).found
    said = str({**read.info, **getattr(read, "text", {})}) if name == "a.png" else read.info["comment"].decode()
    assert NOTICE in said and "dark hair, ünï" in said
    assert "digitalsourcetype/trainedAlgorithmicMedia" in str(read.info.get("xmp") or read.info["XML:com.adobe.xmp"])


def test_without_the_mark_the_pixels_are_the_paintings(tmp_path):
    (image,) = pictures(1, 64)
    assert save(tmp_path / "a.png", image, {}, marked=False, kind=REPAINTED) is False
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert b"compositeWithTrainedAlgorithmicMedia" in (tmp_path / "a.png").read_bytes()


def test_saving_says_when_the_mark_does_not_hold(tmp_path):
    (image,) = pictures(1, 16)
    assert save(tmp_path / "a.png", image, {}) is False


def test_what_is_there_stays(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="there already.*--force"):
        save(path, np.zeros((64, 64, 3), np.uint8), {}, force=False)
    assert path.read_bytes() == b"mine"
    can_write(path, force=True)
    for wrong in (tmp_path, tmp_path / "a.gif", tmp_path / "a"):
        with pytest.raises(UserError, match="cannot write"):
            can_write(wrong, force=True)
    assert os.listdir(tmp_path) == ["a.png"]


# ------------------------------------------------------------------------------------------------------------ checker


def no_hats(prompts, images):
    return ["no hats" if "hat" in prompt else None for prompt in prompts]


def test_a_checker_refuses_what_is_asked():
    allow(None, ["a hat"])
    allow(no_hats, ["dark hair"])
    with pytest.raises(UserError, match="refused by the safety checker: no hats \\('a hat'\\)"):
        allow(no_hats, ["dark hair", "a hat"])


def test_a_checker_blanks_what_was_painted():
    images = np.stack(list(pictures(3, 64)))
    shown, reasons = blank(lambda prompts, given: [None, "bright", None], ["a"] * 3, images)
    assert reasons == [None, "bright", None] and (shown[1] == BLANK).all()
    assert np.array_equal(shown[::2], images[::2]) and not (images[1] == BLANK).all()
    assert blank(None, ["a"] * 3, images)[0] is images


def test_a_checker_sees_prompts_and_pictures():
    seen = []

    def check(prompts, images):
        seen.append((list(prompts), None if images is None else np.shape(images)))
        return [None] * len(prompts)

    images = np.zeros((2, 8, 8, 3), np.uint8)
    allow(check, ["a", "b"])
    allow(check, ["a", "b"], images)
    blank(check, ["a", "b"], images)
    assert seen == [(["a", "b"], None), (["a", "b"], (2, 8, 8, 3)), (["a", "b"], (2, 8, 8, 3))]


@pytest.mark.parametrize("returned", [[], [None] * 3, "ok", [True, None], [None, 0]])
def test_a_checker_that_does_not_answer_is_no_consent(returned):
    with pytest.raises(UserError, match="safety checker has to return"):
        allow(lambda prompts, images: returned, ["a", "b"])


def test_a_checker_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text("def check(prompts, images):\n    return ['no'] * len(prompts)\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_checker("my_rules:check")(["a"], None) == ["no"]
    for name, words in [
        ("my_rules", "module:function"),
        (":check", "module:function"),
        ("my_rules:none", "has no none"),
        ("my_rules:number", "is a int"),
        ("no_such_module:check", "no module"),
    ]:
        with pytest.raises(UserError, match=words):
            load_checker(name)


def test_an_error_inside_a_checkers_module_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_rules.py").write_text("import no_such_package_of_theirs\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_theirs"):
        load_checker("broken_rules:check")
