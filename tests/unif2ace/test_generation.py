"""Learning four faces by heart, painting them from their captions and answering on them; the sampler's terms."""

import numpy as np
import pytest
import tiny
import torch

from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.generation import text as text_generation
from unif2ace.generation.image import PaintSettings, paint_codes
from unif2ace.generation.text import answer
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.prefix import TextPrefix
from unif2ace.model.sequences import Batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace.training.optimizers import OptimizerConfig, build

FACES, STEPS, RATE = 4, 120, 1e-2


class Learned:
    """Four faces, each with one caption and a question on each attribute, and a model trained on nothing else."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.text = tiny.text_tokenizer()
        self.config = UniF2aceConfig(
            vocabulary=VocabularyConfig(self.text.size, 64), hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, image_tokens=16,
            text_slots=48, identity=6, semantic=5, token_moe=tiny.CONFIG.token_moe,
            sequence_moe=tiny.CONFIG.sequence_moe,
        )  # fmt: skip
        self.model = UniF2aceForConditionalGeneration(self.config)
        self.faces = tiny.encoded_faces(FACES, self.config)
        self.captions = [self.text.encode(captions.full_caption(classes)) for classes in self.faces.classes]
        rng = np.random.default_rng(0)
        self.asked = []  # (face, question, answer), token ids
        for face, classes in enumerate(self.faces.classes):
            for attribute in range(len(ATTRIBUTES)):
                question, said = captions.question_answer(classes, attribute, rng)
                self.asked.append((face, self.text.encode(question), self.text.encode(said)))
        optimizers = build(self.model, OptimizerConfig(lr=RATE, matrix_lr=RATE))
        for step in range(STEPS):
            for group in (group for each in optimizers for group in each.param_groups):
                group["lr"] = RATE * (1 - step / STEPS)
            loss, self.terms = tiny.loss(self.model, self.batch(step))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.model.eval()

    def batch(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        vocabulary, end = self.config.vocabulary, self.text.end
        codes = (self.faces.codes + vocabulary.code_range[0]).repeat(3, 1)
        masked = torch.rand(codes.shape, generator=generator) < torch.tensor([[1.0], [0.7], [0.3]]).repeat_interleave(
            FACES, 0
        )
        masked[:, step % 16] = True
        told = [caption if row != step % 12 else [] for row, caption in enumerate(self.captions * 3)]
        prompts = t2i_prompts(told, end, self.config)
        t2i = t2i_batch(
            prompts, codes.masked_fill(masked, vocabulary.mask), self.config, codes.masked_fill(~masked, -100)
        )
        chosen = [self.asked[i] for i in torch.randperm(len(self.asked), generator=generator)[:12]]
        face = torch.tensor([each[0] for each in chosen])
        texts = [[*question, *said, end] for _, question, said in chosen]
        answers = [[False] * len(question) + [True] * (len(said) + 1) for _, question, said in chosen]
        identity, semantic = self.faces.identity[face], self.faces.semantic[face]
        mmu = mmu_batch(codes[face], texts, identity, semantic, self.config, answers)
        return Batch.join([t2i, mmu], vocabulary.pad)

    def paint(self, which=range(FACES), **settings):
        return paint_codes(
            self.model, [self.captions[i] for i in which], self.text.end, PaintSettings(**{"steps": 6, **settings})
        )


@pytest.fixture(scope="module")
def learned():
    return Learned()


def test_a_tiny_model_learns_four_faces_by_heart(learned):
    """At chance the terms are log 64 = 4.2 and about log 3 = 1.1."""
    assert learned.terms["mask"] < 0.1 and learned.terms["mmu"] < 0.3, learned.terms


@pytest.mark.parametrize("settings,least", [({"guidance": 0.0}, 0.9), ({}, 0.5), ({"top_p": 0.9, "steps": 1}, 0.5)])
def test_it_paints_each_face_from_its_caption(learned, settings, least):
    """Share of each face's codes; at chance 1 / 64, and half of 16 right has a probability of 4e-11.

    Guidance subtracts a branch that these few steps hardly train: what it adds hangs on the last bits of the training.
    """
    right = (learned.paint(**settings) == learned.faces.codes).double().mean(1)
    assert (right > least).all(), right
    if settings.get("guidance") == 0.0:
        assert torch.equal(learned.paint([2, 0], **settings), learned.faces.codes[[2, 0]])


def test_it_answers_each_question(learned):
    face = torch.tensor([each[0] for each in learned.asked])
    given = answer(
        learned.model, learned.faces.codes[face], [question for _, question, _ in learned.asked],
        learned.faces.identity[face], learned.faces.semantic[face], learned.text.end,
    )  # fmt: skip
    right = np.mean([ids == said for ids, (_, _, said) in zip(given, learned.asked)])
    assert right > 0.95


def test_an_answer_does_not_depend_on_the_others_in_the_call(learned):
    chosen = learned.asked[5], learned.asked[20], learned.asked[11]

    def ask(each):
        face = torch.tensor([face for face, _, _ in each])
        return answer(
            learned.model, learned.faces.codes[face], [question for _, question, _ in each],
            learned.faces.identity[face], learned.faces.semantic[face], learned.text.end,
        )  # fmt: skip

    assert ask(chosen) == [ask([each])[0] for each in chosen]


def test_an_answer_that_does_not_end_is_cut(learned, monkeypatch):
    face, question, _ = learned.asked[0]
    never = 10**6
    given = answer(
        learned.model, learned.faces.codes[[face]], [question], learned.faces.identity[[face]],
        learned.faces.semantic[[face]], never, max_tokens=3,
    )  # fmt: skip
    assert len(given[0]) == 3 and max(given[0]) < learned.config.vocabulary.text


# ------------------------------------------------------------------------------- the sampler, on a model of no opinion


def opinionless(config=tiny.CONFIG):
    torch.manual_seed(3)
    return UniF2aceForConditionalGeneration(config).eval()


def paint(rows=4, model=None, **settings):
    settings = PaintSettings(**{"steps": 4, "guidance": 1.0, **settings})
    return paint_codes(model or opinionless(), [[5, 6]] * rows, tiny.END, settings)


def test_one_seed_paints_one_set_of_codes():
    codes = paint()
    assert torch.equal(codes, paint()) and not torch.equal(codes, paint(seed=1))
    assert codes.shape == (4, tiny.CONFIG.image_tokens)
    assert codes.min() >= 0 and codes.max() < tiny.CONFIG.vocabulary.codes


def test_rows_of_one_prompt_differ():
    """They are numbered within the call, and a row's draws go by its number."""
    assert len({tuple(row) for row in paint(rows=8).tolist()}) == 8


def test_the_callers_random_state_is_neither_read_nor_moved():
    torch.manual_seed(5)
    model, before = opinionless(), torch.random.get_rng_state()
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    codes = paint(model=model)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(before)
    assert torch.equal(paint(model=model), codes)


def test_every_step_is_shown_and_only_adds():
    shown = []
    paint_codes(opinionless(), [[5]] * 3, tiny.END, PaintSettings(steps=4), on_step=shown.append)
    assert [step.index for step in shown] == [0, 1, 2, 3][: len(shown)]
    mask = tiny.CONFIG.vocabulary.mask
    left = [(step.ids == mask).sum().item() for step in shown]
    assert left[-1] == 0 and left == sorted(left, reverse=True)
    for before, after in zip(shown, shown[1:]):
        kept = before.ids != mask
        assert torch.equal(before.ids[kept], after.ids[kept])


def test_without_guidance_the_empty_prompt_is_not_run(monkeypatch):
    """And captions that are equal are read once."""
    read, rows = [], []

    class Counted(TextPrefix):
        def __init__(self, model, prompts):
            read.append(len(prompts))
            super().__init__(model, prompts)

        def at(self, which):
            rows.append(len(which))
            return super().at(which)

    monkeypatch.setattr("unif2ace.model.painting.TextPrefix", Counted)
    paint(guidance=0.0)
    paint(guidance=2.0)
    assert read == [1, 2] and rows == [4, 8]


def test_the_share_masked_is_told_to_the_model():
    """All masked at first, less later: what the noise expert embeds."""
    seen = []
    model = opinionless()
    model.injection.level.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].tolist()))
    paint(model=model, rows=1)
    shares = [share for (share,) in seen]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 1


def test_a_question_has_a_greatest_length(learned):
    assert text_generation.MAX_QUESTION >= max(len(question) for _, question, _ in learned.asked)
