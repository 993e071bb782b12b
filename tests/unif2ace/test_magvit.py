"""MAGVIT-v2: codes and reconstructions of Show-o's own code, its names, and the interface of an image tokenizer."""

import json
import os

import foreign
import pytest
import torch
from safetensors.torch import save_file

from unif2ace.cli import main
from unif2ace.errors import UserError
from unif2ace.importers import parts
from unif2ace.importers.magvit import import_magvit
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.magvit import Down, Magvit, MagvitConfig

NUMBERS = foreign.numbers("magvit")
SMALL = MagvitConfig(
    side=16, bits=5, width=32, encoder=((1, 2), (2, 1), (2, 1)), decoder=((1, 1), (1, 1), (2, 2))
)  # fmt: skip
IMAGES = foreign.drawn("images", (2, 3, 16, 16)) * (3 * 16 * 16) ** 0.5 / 2


def tensors(bits: int = 5) -> dict[str, torch.Tensor]:
    drawn = foreign.tensors(NUMBERS["tensors"])
    digits = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1) & 1
    return drawn | {
        "quantize.embedding": digits.float() * 2 - 1,
        "quantize.power_vals": 2 ** torch.arange(bits - 1, -1, -1),
    }


def write(path, values=None):
    save_file(tensors() if values is None else values, path / "pytorch_model.safetensors")
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return import_magvit(write(tmp_path), SMALL)[0]


def truth(name: str, *shape: int) -> torch.Tensor:
    return torch.tensor(NUMBERS[name], dtype=torch.float64).view(shape)


def test_codes_and_latents_are_those_of_show_os_own_code(tokenizer):
    expected = truth("latents", 2, 5, 4, 4)
    codes, features = tokenizer.encode(IMAGES)
    assert codes.tolist() == NUMBERS["codes"] and codes.unique().numel() > 10
    single = (features.transpose(1, 2).reshape(2, 5, 4, 4) - expected).abs().max()
    assert single <= 2 * NUMBERS["latents_float32_error"] + 1e-7
    assert (tokenizer.double().latents(IMAGES.double()) - expected).abs().max() < 1e-7


def test_reconstructions_are_those_of_show_os_own_code(tokenizer):
    codes = torch.tensor(NUMBERS["decoded_codes"])
    expected = truth("pixels", 2, 3, 6, 6)

    def pixels():
        with torch.no_grad():
            signs = tokenizer.code_signs(codes).transpose(1, 2).reshape(2, 5, 4, 4)
            return tokenizer.render(signs)

    assert (pixels()[:, :, ::3, ::3] - expected).abs().max() <= 2 * NUMBERS["pixels_float32_error"] + 1e-7
    assert expected.abs().max() > 1, "so that clamping shows"
    assert torch.equal(tokenizer.decode(codes), pixels().clamp(-1, 1))
    tokenizer.double()
    assert (pixels()[:, :, ::3, ::3] - expected).abs().max() < 1e-7


def test_it_stands_in_the_image_tokenizers_place(tokenizer):
    """The same questions get answers of the same kinds."""
    other = ImageTokenizer(ImageTokenizerConfig(side=16, bits=5, fine=8, coarse=8, blocks=1))
    for each in (tokenizer, other):
        codes, features = each.encode(IMAGES)
        grid, bits = each.config.grid, each.config.bits
        assert codes.shape == (2, grid**2) and codes.dtype == torch.int64 and features.shape == (2, grid**2, bits)
        assert 0 <= codes.min() and codes.max() < each.config.codes == 2**bits
        images = each.decode(codes)
        assert images.shape == IMAGES.shape and images.abs().max() <= 1 and each.config.side == 16
        assert torch.equal(each.code_signs(codes), torch.where(features > 0, 1.0, -1.0))


@pytest.mark.parametrize("side", [12, 40])
def test_the_weights_serve_every_side(tmp_path, side):
    other = import_magvit(write(tmp_path), MagvitConfig(**{**vars(SMALL), "side": side}))[0]
    codes, _ = other.encode(torch.rand(1, 3, side, side) * 2 - 1)
    assert codes.shape == (1, (side // 4) ** 2) and other.decode(codes).shape == (1, 3, side, side)


def test_halving_pads_on_the_right_and_below_only():
    """What stands in the first row and column is the kernel's first, never its middle."""
    down = Down(1)
    with torch.no_grad():
        down.conv.weight.copy_(torch.arange(9.0).view(1, 1, 3, 3))
        down.conv.bias.zero_()
        corners = torch.zeros(2, 1, 4, 4)
        corners[0, 0, 0, 0] = corners[1, 0, 3, 3] = 1
        first, last = down(corners)
    assert first[0].tolist() == [[0, 0], [0, 0]] and down(torch.ones(1, 1, 4, 4))[0, 0, 0, 0] == 36
    assert last[0].tolist() == [[0, 0], [0, 4]]


def test_show_os_sizes():
    """95.4 M parameters and the quantiser's table are the 382 MB of the published file."""
    config = MagvitConfig()
    with torch.device("meta"):
        model = Magvit(config)
    assert (config.grid, config.codes, config.patch) == (16, 8192, 16)
    assert sum(p.numel() for p in model.parameters()) == 95387004
    assert MagvitConfig(side=512).grid == 32


def test_sizes_that_do_not_fit_are_named(tokenizer):
    for images in (IMAGES[:, :, :8], IMAGES[:, :1], IMAGES[0]):
        with pytest.raises(ValueError, match="images: expected shape"):
            tokenizer.encode(images)
    with pytest.raises(ValueError, match="codes: expected shape"):
        tokenizer.decode(torch.zeros(2, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="side: expected a multiple of 4"):
        Magvit(MagvitConfig(**{**vars(SMALL), "side": 18}))
    with pytest.raises(ValueError, match="decoder: expected 3 levels"):
        Magvit(MagvitConfig(**{**vars(SMALL), "decoder": ((1, 1),)}))


def test_every_tensor_has_its_own_place(tmp_path):
    """Each of theirs holds its own number: all of it is found in one of ours, on the same side."""
    names = [name for name in NUMBERS["tensors"] if not name.startswith("quantize.")]
    values = tensors() | {name: torch.full(NUMBERS["tensors"][name], float(n)) for n, name in enumerate(names)}
    found: dict[str, list[str]] = {}
    for ours, value in import_magvit(write(tmp_path, values), SMALL)[0].state_dict().items():
        for number, count in zip(*value.unique(return_counts=True)):
            name = names[int(number)]
            assert int(count) == values[name].numel() and ours.split(".")[0] == name.split(".")[0]
            found.setdefault(name, []).append(ours)
    assert len(found) == len(names) and all(len(places) == 1 for places in found.values())


def test_save_and_load_give_the_same_codes(tokenizer, tmp_path):
    out = tmp_path / "out"
    parts.save(tokenizer, out)
    after = parts.load_image_tokenizer(out)
    assert after.config == SMALL and not after.training
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.encode(IMAGES), after.encode(IMAGES)))
    with pytest.raises(UserError, match="holds no model: it has image_tokenizer"):
        foreign.load_model(out)
    config = json.loads((out / "config.json").read_text())
    for change, words in (
        ({"bits": 6}, "of another shape"),
        ({"side": 17}, "does not describe an image tokenizer: .*side"),
        ({"colour": 1}, "does not describe an image tokenizer"),
        ({"kind": "another"}, "another image tokenizer"),
    ):
        part = {**config["image_tokenizer"], **change}
        (out / "config.json").write_text(json.dumps({**config, "image_tokenizer": part}))
        with pytest.raises(UserError, match=words):
            parts.load_image_tokenizer(out)


WRONG = {
    "missing": ({"encoder.mid.attn_1.k.weight": None}, ["missing", "encoder.mid.attn_1.k.weight"]),
    "unexpected": ({"loss.discriminator.weight": torch.zeros(1)}, ["unexpected", "loss.discriminator.weight"]),
    "shape": (
        {"decoder.conv_out.weight": torch.zeros(1, 32, 3, 3)},
        ["another shape", "decoder.conv_out.weight is [1,"],
    ),
    "no table": ({"quantize.embedding": None}, ["missing", "quantize.embedding"]),
    "digits in another order": ({"quantize.power_vals": 2 ** torch.arange(5)}, ["numbered in another way"]),
    "another table": ({"quantize.embedding": -tensors()["quantize.embedding"]}, ["numbered in another way"]),
}


@pytest.mark.parametrize("changes,words", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(tmp_path, changes, words):
    path = write(tmp_path, {name: value for name, value in (tensors() | changes).items() if value is not None})
    with pytest.raises(UserError) as raised:
        import_magvit(path, SMALL)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_the_command_reads_show_os_sizes(tmp_path, capsys):
    """A small one is not one; the folder stays as it was."""
    write(tmp_path)
    assert main(["import", "magvit", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "is not a MAGVIT-v2" in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert os.listdir(tmp_path) == ["pytorch_model.safetensors"]
    with pytest.raises(SystemExit):
        main(["import", "magvit", str(tmp_path), "--out", str(tmp_path / "out"), "--dense"])
    assert "unrecognized arguments: --dense" in capsys.readouterr().err
