"""The conventions of transformers: Auto classes, generation with a cache, checkpointing, ties, attention by name."""

import subprocess
import sys

import pytest
import tiny
import torch
from test_checkpoint import make
from test_model import VARIANTS
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import unif2ace
from unif2ace import UniF2aceConfig, UniF2aceForConditionalGeneration, UniF2aceProcessor
from unif2ace.configs import MMU
from unif2ace.errors import UserError
from unif2ace.model.sequences import IGNORE, Batch, lm_batch, padded_left
from unif2ace.training.gradients import recompute

V = tiny.CONFIG.vocabulary


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if name not in ("labels", "layout", "shares")}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request) -> UniF2aceConfig:
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto") / "checkpoint"
    make().save(folder)
    return folder


def test_auto_classes_know_the_model(saved):
    assert isinstance(AutoConfig.from_pretrained(saved), UniF2aceConfig)
    assert isinstance(AutoProcessor.from_pretrained(saved), UniF2aceProcessor)
    for auto in (AutoModel, AutoModelForImageTextToText):
        model = auto.from_pretrained(saved)
        assert isinstance(model, UniF2aceForConditionalGeneration)
        for (name, ours), theirs in zip(make().model.state_dict().items(), model.state_dict().values()):
            assert torch.equal(ours, theirs), name
        assert model.blocks[0].sequence.keeps.tolist() == make().model.blocks[0].sequence.keeps.tolist()


def test_the_package_alone_imports_no_transformers():
    """So that the command starts at once; a name that needs it registers the classes."""
    code = (
        "import sys, unif2ace; assert 'transformers' not in sys.modules; unif2ace.UniF2aceConfig; "
        "from transformers import CONFIG_MAPPING; assert 'unif2ace' in CONFIG_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="UniF3ace"):
        getattr(unif2ace, "UniF3" + "ace")


@torch.no_grad()
def test_cached_and_whole_rows_give_the_same_logits(config):
    """Token by token, and several at once; in rows of unequal length."""
    model = tiny.lively(config)
    (batch,) = tiny.double(padded_left(tiny.mmu((9, 7, 12), config=config), V.pad))
    want = model(**tensors(batch)).logits
    for chunks in ([1] * 6, [3, 2, 1]):
        first = batch.input_ids.shape[1] - sum(chunks)
        start = tensors(batch) | {
            "input_ids": batch.input_ids[:, :first],
            "attention_mask": batch.attention_mask[:, :first],
        }
        output = model(**start, use_cache=True)
        for count in chunks:
            stop = first + count
            output = model(
                batch.input_ids[:, first:stop], batch.attention_mask[:, :stop], batch.task, batch.image_start,
                past_key_values=output.past_key_values,
            )  # fmt: skip
            assert output.past_key_values.get_seq_length() == stop
            real = batch.attention_mask[:, first:stop]
            torch.testing.assert_close(output.logits[real], want[:, first:stop][real], rtol=1e-9, atol=1e-9)
            first = stop


def test_generation_with_a_cache_is_generation_without(config):
    model = tiny.lively(config)
    (batch,) = tiny.double(padded_left(tiny.mmu((5, 2, 7), config=config), V.pad))
    options = {**tensors(batch), "max_new_tokens": 6, "do_sample": False, "pad_token_id": V.pad}
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    assert cached.shape[1] == batch.input_ids.shape[1] + 6
    assert cached[:, -6:].max() < V.text, "text is said, and nothing else"
    assert len({tuple(row) for row in cached[:, -6:].tolist()}) > 1


def test_a_row_gets_in_a_batch_what_it_gets_alone(config):
    model, lengths = tiny.lively(config), (5, 2, 7)
    (whole,) = tiny.double(tiny.mmu(lengths, config=config))

    def generate(rows: Batch) -> list[list[int]]:
        rows = padded_left(rows, V.pad)
        written = model.generate(**tensors(rows), max_new_tokens=4, do_sample=False, pad_token_id=V.pad)
        return written[:, rows.input_ids.shape[1] :].tolist()

    alone = []
    for row, length in enumerate(lengths):
        cut = {name: value[row : row + 1] for name, value in tensors(whole).items()}
        end = tiny.CONFIG.image_tokens + 3 + length
        cut |= {"input_ids": cut["input_ids"][:, :end], "attention_mask": cut["attention_mask"][:, :end]}
        alone += generate(Batch(**cut, labels=torch.full_like(cut["input_ids"], IGNORE)))
    assert generate(whole) == alone


def test_plain_text_needs_nothing_but_its_ids():
    """And goes on; a sampled and a searched continuation are transformers' own."""
    model = tiny.lively()
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    (batch,) = tiny.double(lm_batch(ids.tolist(), tiny.CONFIG))
    torch.testing.assert_close(model(ids).logits, model(**tensors(batch)).logits)
    assert model(ids, logits_to_keep=2).logits.shape == (1, 2, V.size)
    torch.manual_seed(0)
    assert model.generate(ids, max_new_tokens=3, do_sample=True).shape == (1, 8)
    searched = model.generate(ids, max_new_tokens=3, num_beams=3, num_return_sequences=2, do_sample=False)
    assert searched.shape == (2, 8) and torch.equal(searched[:, :5], ids.expand(2, -1))


def test_rows_of_plain_text_change_nothing_for_the_others(config):
    """And count in the loss with their own coefficient."""
    model = tiny.lively(config)
    (text,) = tiny.double(lm_batch(tiny.texts((9, 3, 6), seed=4), config))
    faces = tiny.mixed(config=config)
    both = Batch.join([faces, text], V.pad)
    alone, together = model(**vars(faces)), model(**vars(both))
    for name in ("mask", "score", "mmu"):
        torch.testing.assert_close(together.terms[name], alone.terms[name])
    states = alone.last_hidden_state[faces.attention_mask]
    torch.testing.assert_close(together.last_hidden_state[:6][both.attention_mask[:6]], states)
    logits, labels = model(**tensors(text)).logits, text.labels
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(together.terms["lm"], want.detach(), check_dtype=False)
    balance = together.terms.get("balance", 0) - alone.terms.get("balance", 0)
    torch.testing.assert_close(together.loss - alone.loss - balance, config.loss.lm * want, check_dtype=False)


def test_gradient_checkpointing_changes_no_gradient(config):
    batch, gradients, runs = tiny.mixed(config=config), [], []
    for checkpointing in (False, True):
        model = tiny.lively(config).train()
        if checkpointing:
            recompute(model)
            model.blocks[0].norm.register_forward_hook(lambda *_: runs.append(1))
        model(**vars(batch)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(runs) == 2, "the block did not run again in the backward pass"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_ties_tie(tmp_path):
    config = tiny.config(tie_word_embeddings=True)
    model = UniF2aceForConditionalGeneration(config)
    assert model.head.weight is model.embedding.weight
    model.save_pretrained(tmp_path / "tied")
    again = UniF2aceForConditionalGeneration.from_pretrained(tmp_path / "tied")
    assert again.head.weight is again.embedding.weight and torch.equal(again.head.weight, model.head.weight)


def test_flex_attention_gives_the_same(config, saved):
    batch = tiny.mixed(config=config)
    model = tiny.lively(config.replace())  # whose config is told another kernel
    with torch.no_grad():
        want = model(**vars(batch)).last_hidden_state
        model.set_attn_implementation("flex_attention")
        got = model(**vars(batch)).last_hidden_state
    torch.testing.assert_close(got[batch.attention_mask], want[batch.attention_mask])
    named = UniF2aceForConditionalGeneration.from_pretrained(saved, attn_implementation="flex_attention")
    assert named.config._attn_implementation == "flex_attention"


def test_a_face_comes_in_as_pixels():
    checkpoint = make(semantic=4, semantic_source="image_tokenizer")
    model, processor = checkpoint.model, checkpoint.processor
    pictures = [torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy() for _ in range(2)]
    identity = torch.randn(2, 6)
    batch = processor(images=pictures, text=["is the mouth open ?", "what hair ?"], identity=identity)
    codes, latents = model.image_tokenizer.encode(processor.pixels(pictures))
    by_hand = processor(codes=codes, text=["is the mouth open ?", "what hair ?"], identity=identity, semantic=latents)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**by_hand).logits)
    assert (batch["task"] == MMU).all() and batch["attention_mask"].all(1).sum() == 1
    written = model.generate(**batch, max_new_tokens=3, do_sample=False)
    said = processor.post_process_text(written, batch["input_ids"])
    assert len(said) == 2 and all(isinstance(each, str) for each in said)


def test_faces_are_painted_from_a_processed_prompt():
    checkpoint = make()
    rows = checkpoint.processor(text=["dark hair", "a big smile"])
    images = checkpoint.model.generate_image(**rows, steps=3, seed=1)
    assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1
    codes = checkpoint.model.generate_image(rows["input_ids"], steps=3, seed=1, output_codes=True)
    torch.testing.assert_close(images, checkpoint.image_tokenizer.decode(codes))
    known = torch.full_like(codes, -1)
    known[:, :2] = 5
    again = checkpoint.model.generate_image(rows["input_ids"], codes=known, steps=3, output_codes=True)
    assert (again[:, :2] == 5).all()
    assert [each.size for each in checkpoint.processor.post_process_images(images)] == [(16, 16)] * 2


def test_what_is_wrong_is_named():
    model, processor = make().model, make().processor
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"got also \['imput_ids'\]"):
        model(ids, imput_ids=ids)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \[1, 3\], got \[1, 2\]"):
        model(ids, attention_mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="past_key_values: expected None"):
        model(
            ids, attention_mask=torch.ones(1, 6), past_key_values=model(ids, use_cache=True).past_key_values, labels=ids
        )
    face = torch.zeros(1, 4, dtype=torch.int64)
    asked = processor(codes=face, text="what hair ?")
    with pytest.raises(ValueError, match="semantic: expected the features"):
        model(**asked)
    with pytest.raises(ValueError, match="output_codes: expected True"):
        UniF2aceForConditionalGeneration(tiny.CONFIG).generate_image(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got also \['stepz'\]"):
        model.generate_image(**processor(text="dark hair"), stepz=3)
    with pytest.raises(ValueError, match="input_ids: expected at least 7 tokens"):
        model.generate_image(ids)
    with pytest.raises(UserError, match="2 questions on 1 faces"):
        processor(codes=face, text=["a", "b"])
    with pytest.raises(UserError, match="no text"):
        processor(codes=face)
    with pytest.raises(ValueError, match="task: expected t2i, mmu or lm"):
        processor(text="a", task="paint")
    with pytest.raises(ValueError, match="images: expected faces"):
        processor(text="a", task="mmu")
    with pytest.raises(UserError, match="expected uint8 pictures"):
        processor(images=torch.zeros(3, 3).numpy(), text="what hair ?")
