"""Run the public Show-o code at a small size and keep its numbers: showo.json and magvit.json beside this file.

    python make.py SHOW_O      a checkout of github.com/showlab/Show-o, with the packages that it imports
                               (transformers 4.46, diffusers 0.30; its code runs on the CPU)

Weights are `foreign.drawn` by its own tensors' names. Values are computed in float64; `float32_error` is how far the
same code is from them in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent
sys.path[:0] = [sys.argv[1], str(HERE.parent)]

from foreign import drawn  # noqa: E402
from models.modeling_magvitv2 import LFQuantizer, MAGVITv2, VQGANDecoder, VQGANEncoder  # noqa: E402
from models.modeling_showo import Showo  # noqa: E402
from training.prompting_utils import (  # noqa: E402
    UniversalPrompting,
    create_attention_mask_for_mmu,
    create_attention_mask_predict_next,
)
from transformers import PhiConfig  # noqa: E402

TEXT, CODES, N, END = 40, 16, 4, 0
FIRST, MASK = TEXT + 10, TEXT + 10 + CODES
COLUMNS = list(range(0, MASK + 1, 6))  # of the logits that are kept


def fill(module: torch.nn.Module) -> None:
    for name, value in module.state_dict().items():
        if not name.startswith("quantize."):
            value.copy_(drawn(name, value.shape))


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def write(name: str, content: dict) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    (HERE / f"{name}.json").write_text("{\n" + lines + "\n}\n")


def rounded(values: torch.Tensor) -> list:
    return [float(f"{each:.8g}") for each in values.flatten().tolist()]


def prompting(text_slots: int) -> UniversalPrompting:
    self = UniversalPrompting.__new__(UniversalPrompting)
    self.text_tokenizer = SimpleNamespace(bos_token_id=END, eos_token_id=END)
    names = ("<|pad|>", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>")
    self.sptids_dict = {name: torch.tensor([TEXT + place]) for place, name in enumerate(names)}
    self.pad_id, self.ignore_id, self.max_text_len = TEXT, -100, text_slots
    return self


def showo() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PhiConfig(
            vocab_size=51, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64,
        ).save_pretrained(folder)  # fmt: skip
        model = Showo(False, MASK + 1, TEXT, llm_model_path=folder, codebook_size=CODES, num_vq_tokens=N).eval()
    fill(model)
    captions = [[11, 12, 13], [], [7, 9, 21, 33, 5]]
    codes = torch.tensor([[FIRST, MASK, FIRST + 15, MASK], [MASK] * 4, [FIRST + 3, FIRST + 9, MASK, FIRST + 1]])
    texts = [[4, 5, 6, 7, 8], [30, 31], [2]]
    slots, special = prompting(9), {"pad_id": TEXT, "soi_id": TEXT + 1, "eoi_id": TEXT + 2}
    t2i = slots.t2i_gen_prompt([list(each) for each in captions], codes)[0]
    image = FIRST + torch.arange(12).view(3, 4)
    mmu = slots.mmu_prompt(image, [list(each) for each in texts])[0]
    content = {
        "tensors": shapes(model), "columns": COLUMNS, "captions": captions, "t2i_codes": codes.tolist(),
        "texts": texts, "mmu_codes": image.tolist(),
    }  # fmt: skip
    masks = {
        "t2i": (t2i, create_attention_mask_predict_next(t2i, **special, rm_pad_in_image=True)),
        "mmu": (mmu, create_attention_mask_for_mmu(mmu, eoi_id=TEXT + 2)),
    }
    for name, (tokens, mask) in masks.items():
        single = model.float()(tokens, attention_mask=mask.float())[:, :, COLUMNS]
        exact = model.double()(tokens, attention_mask=mask.double())[:, :, COLUMNS]
        exact, single = exact[tokens != TEXT], single[tokens != TEXT]  # nobody asks what padding answers
        content |= {
            f"{name}_tokens": tokens.tolist(),
            f"{name}_logits": rounded(exact),
            f"{name}_float32_error": (single - exact).abs().max().item(),
        }
    write("showo", content)


class SmallMagvit(torch.nn.Module):
    get_code, decode_code = MAGVITv2.get_code, MAGVITv2.decode_code

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VQGANEncoder(ch=32, ch_mult=[1, 2, 2], num_res_blocks=[2, 1, 1], z_channels=5)
        self.decoder = VQGANDecoder(ch=32, ch_mult=[1, 1, 2], num_res_blocks=[1, 1, 2], z_channels=5)
        self.quantize = LFQuantizer(codebook_dim=5)


def magvit() -> None:
    model = SmallMagvit().eval()
    fill(model)
    images = drawn("images", (2, 3, 16, 16)) * (3 * 16 * 16) ** 0.5 / 2
    single = model.encoder(images)
    codes = torch.arange(32).view(2, 16)
    single_image = model.decode_code(codes)
    model.double()
    exact, image = model.encoder(images.double()), model.decode_code(codes)
    content = {
        "tensors": shapes(model), "latents": rounded(exact), "codes": model.get_code(images.double()).tolist(),
        "decoded_codes": codes.tolist(), "pixels": rounded(image[:, :, ::3, ::3]),
        "latents_float32_error": (single - exact).abs().max().item(),
        "pixels_float32_error": (single_image - image)[:, :, ::3, ::3].abs().max().item(),
    }  # fmt: skip
    write("magvit", content)


with torch.no_grad():
    showo()
    magvit()
