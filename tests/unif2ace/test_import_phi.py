"""Phi-1.5's weights: transformers' PhiForCausalLM says what they compute, alone and under both tasks' masks."""

import json
import os

import foreign
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PhiConfig, PhiForCausalLM

from unif2ace.cli import main
from unif2ace.errors import UserError
from unif2ace.importers import parts
from unif2ace.importers.phi import Options, import_phi
from unif2ace.importers.showo import import_showo
from unif2ace.importers.texts import load_text_tokenizer
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import mmu_batch, t2i_batch, t2i_prompts
from unif2ace.model.visibility import Visibility

TEXT, CODES, N, END = 40, 16, 4, 0


def phi(qk_layernorm: bool = True, rows: int = 67) -> torch.nn.Module:
    """A small PhiForCausalLM, every weight of which matters."""
    config = PhiConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        qk_layernorm=qk_layernorm,
        attn_implementation="eager",
    )
    model = PhiForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(foreign.drawn(name, value.shape))
    return model


def save(model: torch.nn.Module, folder, settings=None):
    """As transformers writes it, `settings` changed."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), **(settings or {})}, default=str))
    return folder


def read(path, **options) -> UniF2aceForConditionalGeneration:
    sizes = {name: options.pop(name, value) for name, value in {"text": TEXT, "codes": CODES}.items()}
    return import_phi(path, **sizes, image_tokens=N, options=Options(**options))[0]


def theirs(model: torch.nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Their logits, under [B, 1, L, L] of True where it sees, or causal."""
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, use_cache=False).logits


def assert_as_close(a: torch.Tensor, b: torch.Tensor, exact: torch.Tensor) -> None:
    """Two float32 results: the first is at most twice as far from the float64 one as the second."""
    assert exact.std() > 0.5
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 1e-7


@pytest.mark.parametrize("dense", [False, True], ids=["experts", "dense"])
def test_text_logits_are_phis(tmp_path, dense):
    """A t2i row's text is causal: it sees nothing of the image, and Phi reads it without one."""
    reference = phi()
    model = read(save(reference, tmp_path / "phi"), dense=dense)
    prompts = torch.tensor([[2, 7, 9, 21, 33, 5, 11, 12, 13], [14, 39, 0, 3, 3, 30, 31, 1, 8]])
    batch = t2i_batch(prompts, torch.full((2, N), model.config.vocabulary.mask), model.config)
    columns = slice(0, TEXT)
    a, b = foreign.logits(model, batch)[:, :9, columns], theirs(reference, prompts)[..., columns]
    exact = theirs(reference.double(), prompts)[..., columns]
    assert_as_close(a, b, exact)
    torch.testing.assert_close(foreign.logits(model.double(), batch)[:, :9, columns], exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("task", ["t2i", "mmu"])
def test_both_tasks_logits_are_phis_under_our_masks(tmp_path, task):
    """All rows of the vocabulary taken, as one tensor of a Show-o is: specials, codes and the mask token too."""
    reference = phi()
    tensors = {f"showo.{name}": value.contiguous() for name, value in reference.state_dict().items()}
    (tmp_path / "show-o").mkdir()
    save_file(tensors, tmp_path / "show-o" / "model.safetensors")
    settings = {"llm_vocab_size": TEXT, "codebook_size": CODES, "num_vq_tokens": N}
    (tmp_path / "show-o" / "config.json").write_text(json.dumps(settings))
    model, _ = import_showo(tmp_path / "show-o")
    config = model.config.replace(text_slots=9)
    codes = config.vocabulary.code_range[0] + torch.arange(12).view(3, N)
    if task == "t2i":
        batch = t2i_batch(t2i_prompts([[3, 4], [], [5, 6, 7, 8, 9]], END, config), codes, config)
    else:
        features = torch.randn(3, config.identity), torch.randn(3, N, config.semantic)
        batch = mmu_batch(codes, [[3, 4, 5], [6], [7, 8, 9, 10, 11]], *features, config)
    valid = batch.attention_mask
    mask = Visibility(valid, batch.task, batch.image_start, N).mask(valid.shape[1])
    a, b = foreign.logits(model, batch)[valid], theirs(reference, batch.input_ids, mask)[valid]
    assert_as_close(a, b, theirs(reference.double(), batch.input_ids, mask)[valid])


def test_which_row_goes_where(tmp_path):
    """Text rows are Phi's; what its tokenizer never gives out is left; specials, codes and the mask begin anew."""
    reference = phi(rows=51)
    model = read(save(reference, tmp_path / "phi"))
    embedding, head = reference.model.embed_tokens.weight, reference.lm_head
    assert model.config.vocabulary.size == 67
    for mine, row in ((model.embedding.weight, embedding), (model.head.weight, head.weight)):
        assert torch.equal(mine[:TEXT], row[:TEXT])
        fresh = mine[TEXT:]
        assert not torch.equal(fresh[:11], row[TEXT:]) and 0.015 < fresh.std() < 0.025
    assert torch.equal(model.head.bias[:TEXT], head.bias[:TEXT]) and not model.head.bias[TEXT:].any()


def test_without_q_and_k_layernorm_they_begin_at_one_and_zero(tmp_path, capsys):
    path, out = save(phi(qk_layernorm=False, rows=51), tmp_path / "phi"), tmp_path / "out"
    model = read(path)
    for block in model.blocks:
        for norm in (block.attention.q_norm, block.attention.k_norm):
            assert (norm.weight == 1).all() and not norm.bias.any()
    told = "\n".join(import_phi(path, text=TEXT)[1])
    assert "train before use" in told and "licence: MIT" in told and "11 rows that no text token uses" in told
    assert "train before use" not in "\n".join(import_phi(save(phi(), tmp_path / "another"), text=TEXT)[1])
    assert main(["import", "phi", str(path), "--out", str(out)]) == 1
    assert "51 rows, fewer than the 50295" in capsys.readouterr().err and not out.exists()


def test_one_seed_one_model(tmp_path):
    """Drawn parts do not hang on what was drawn before, and draw nothing from the caller's stream."""
    path = save(phi(rows=51), tmp_path / "phi")
    state = torch.get_rng_state()
    a = read(path).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    b = read(path).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "tensors,words",
    [
        ({"model.layers.1.self_attn.q_layernorm.bias": None}, ["missing", "q_layernorm.bias"]),
        ({"model.layers.0.self_attn.k_proj.weight": torch.zeros(16, 32)}, ["another shape", "k_proj.weight"]),
        ({"transformer.h.0.ln.weight": torch.zeros(32)}, ["unexpected", "transformer.h.0.ln.weight"]),
        ({"model.embed_tokens.weight": None}, ["is not a Phi"]),
        ({"model.layers.0.mlp.fc1.weight": torch.zeros(40, 32)}, ["another shape"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, tensors, words):
    state = dict(phi().state_dict()) | tensors
    (tmp_path / "phi").mkdir()
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, tmp_path / "phi" / "model.safetensors")
    (tmp_path / "phi" / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(UserError) as raised:
        read(tmp_path / "phi")
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == ["phi"]


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"hidden_act": "relu"}, "hidden_act relu, only gelu_new"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_a_phi_of_another_function_is_not_taken(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        read(save(phi(), tmp_path / "phi", settings))


@pytest.mark.parametrize(
    "settings,share,channels",
    [
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, 0.25, 2),
        ({"rope_parameters": None, "partial_rotary_factor": 1}, 1, 8),
        ({"rope_parameters": None}, 0.5, 4),
    ],
    ids=["as transformers writes it", "as older files have it", "unsaid"],
)
def test_the_share_of_channels_that_turn_is_its_configs(tmp_path, settings, share, channels):
    model = read(save(phi(), tmp_path / "phi", settings))
    assert model.config.partial_rotary_factor == share and model.rotary_channels == channels


@pytest.mark.parametrize("width,expert", [(40, 1), (8192, 384)])
def test_experts_keep_their_share_of_any_ffn(tmp_path, width, expert):
    config = PhiConfig(
        vocab_size=67, hidden_size=32, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4
    )
    path = save(PhiForCausalLM(config), tmp_path / "phi")
    assert read(path).config.token_moe.width == expert and read(path, dense=True).config.token_moe is None
    features = read(path, identity=128, semantic=13).config
    assert (features.identity, features.semantic) == (128, 13)


# --------------------------------------------------------------------------------------------------- its tokenizer.json


def bpe(more: int = 0, end: str = "<|endoftext|>") -> Tokenizer:
    """Byte-level BPE as GPT-2's is, 259 tokens and `more`: letters keep their case, the end token is the last."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "He", "he", *(f"word{n}" for n in range(more))]
    tokenizer = Tokenizer(models.BPE({each: n for n, each in enumerate(words)}, [("H", "e"), ("h", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    return tokenizer


def test_the_tokenizer_comes_along_as_it_is(tmp_path, capsys):
    path, out = save(phi(rows=300), tmp_path / "phi"), tmp_path / "out"
    bpe().save(str(path / "tokenizer.json"))
    assert main(["import", "phi", str(path), "--out", str(out)]) == 0
    assert f"text tokenizer: {path / 'tokenizer.json'}" in (told := capsys.readouterr().out)
    assert "text tokens 0 to 258" in told and "41 rows that no text token uses" in told
    assert (out / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    text = load_text_tokenizer(out)
    assert text.size == parts.model_config(out).vocabulary.text == 259
    assert text.encode("He he HE") != text.encode("he he he"), "the case of letters is kept"
    assert text.decode(text.encode("He, he  HE!")) == "He, he  HE!"


@pytest.mark.parametrize(
    "content,words",
    [
        (bpe().to_str()[:-20], "tokenizer.json is damaged"),
        ("{}", "tokenizer.json is damaged"),
        (bpe(end="</s>").to_str(), "expected one with the token <|endoftext|>"),
        (bpe(42).to_str(), "300 rows, fewer than the 301 text tokens"),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_named(tmp_path, capsys, content, words):
    path, out = save(phi(rows=300), tmp_path / "phi"), tmp_path / "out"
    (path / "tokenizer.json").write_text(content)
    assert main(["import", "phi", str(path), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not out.exists()
