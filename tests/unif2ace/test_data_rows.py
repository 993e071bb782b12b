"""Rows: what of a sample is asked, answered, masked, cut; and what is said of a sample that cannot be one."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import streams
import torch

from unif2ace.data.config import DataConfig, MixConfig, SetConfig
from unif2ace.data.rows import Lengths, RowMaker
from unif2ace.data.samples import Sample, SampleError
from unif2ace.model.sequences import IGNORE, mmu_batch

TALK = ((("how is the hair?", "dark"), ("and the mouth?", "smiling")), (("where does the face look?", "left"),))
text, model = streams.text, streams.model  # fixtures


def maker(text, model, **changes) -> RowMaker:
    data = DataConfig(sets=(SetConfig("x"),), **{"guidance_dropout": 0.0, "seed": 3, **changes})
    return RowMaker(data, model, text)


def sample(**changes) -> Sample:
    values = {
        "captions": ("a face with dark hair",),
        "conversations": TALK,
        "codes": np.array([3, 15, 0, 7], np.uint16),
    }
    return Sample("s", "file at 3", **{**values, **changes})


def rng(seed=0):
    return np.random.default_rng(seed)


def said(row, text) -> list[tuple[str, str]]:
    """(question, answer) pairs of an mmu row."""
    pairs, parts = [], {False: [], True: []}
    for token, wanted in zip(row.ids, row.answers, strict=True):
        parts[wanted].append(token)
        if wanted and token == text.end:
            pairs.append((text.decode(parts[False]), text.decode(parts[True])))
            parts = {False: [], True: []}
    assert not parts[True], "an answer without its end"
    return pairs


def test_a_conversation_keeps_its_turns_in_order(text, model):
    rows = maker(text, model, questions=9, describe=(), text_length=90)
    orders = set()
    for seed in range(20):
        pairs = said(rows.mmu(sample(), rng(seed), Counter()), text)
        assert sorted(pairs) == sorted(turn for talk in TALK for turn in talk)
        assert pairs.index(TALK[0][0]) < pairs.index(TALK[0][1])
        orders.add(tuple(pairs))
    assert len(orders) == 2, "either conversation may come first"


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_questions_than_allowed(text, model, most):
    rows = maker(text, model, questions=most, describe=(), text_length=90)
    told = Counter()
    assert {len(said(rows.mmu(sample(), rng(seed), told), text)) for seed in range(9)} == {most}
    assert not told, "what is not asked was not lost"


def test_a_caption_answers_a_request_to_describe(text, model):
    rows = maker(text, model, describe=("describe the face.",), text_length=90)
    only = sample(conversations=())
    assert said(rows.mmu(only, rng(), Counter()), text) == [("describe the face.", "a face with dark hair")]
    with pytest.raises(SampleError, match="no question with an answer that fits") as caught:
        maker(text, model, describe=()).mmu(only, rng(), Counter())
    assert not caught.value.corrupt
    every = [said(rows.mmu(sample(), rng(seed), Counter()), text) for seed in range(30)]
    assert any(pairs[0][0] == "describe the face." for pairs in every)
    assert any(pairs[-1][0] == "describe the face." for pairs in every)


def test_what_does_not_fit_after_others_is_left_whole_for_another_row(text, model):
    room = len(text.encode("how is the hair?")) + len(text.encode("dark")) + 1
    second = len(text.encode("and the mouth?"))  # this question has room, its answer and end have not
    rows = maker(text, model, describe=(), text_length=room + second + 1)
    told = Counter()
    pairs = said(rows.mmu(sample(conversations=TALK[:1]), rng(), told), text)
    assert pairs == [TALK[0][0]] and told == {"dropped": 1}


@pytest.mark.parametrize("over_long", ["truncate", "drop"])
def test_an_answer_longer_than_any_row(text, model, over_long):
    asked = text.encode("how is the hair?")
    rows = maker(text, model, describe=(), text_length=len(asked) + 3, over_long=over_long)
    long = sample(conversations=((("how is the hair?", "dark " * 30),),))
    told = Counter()
    if over_long == "drop":
        with pytest.raises(SampleError, match="that fits"):
            rows.mmu(long, rng(), told)
        assert told == {"dropped": 1}
    else:
        row = rows.mmu(long, rng(), told)
        assert row.ids == asked + text.encode("dark " * 30)[:3] and told == {"truncated": 1}
        assert text.end not in row.ids, "a cut answer must not teach to stop there"
        assert row.answers == [False] * len(asked) + [True] * 3


def test_a_question_longer_than_any_row_is_let_go(text, model):
    told = Counter()
    with pytest.raises(SampleError, match="that fits"):
        maker(text, model, describe=(), text_length=5).mmu(sample(conversations=TALK[1:]), rng(), told)
    assert told == {"dropped": 1}


@pytest.mark.parametrize("over_long", ["truncate", "drop"])
def test_a_caption_that_does_not_fit(text, model, over_long):
    rows = maker(text, model, over_long=over_long)
    long = sample(captions=("dark hair " * 20,))
    told, mask_prob = Counter(), torch.tensor(0.5)
    if over_long == "drop":
        with pytest.raises(SampleError, match=r"its caption has \d+ tokens where 21 fit"):
            rows.t2i(long, rng(), mask_prob, 0, told)
        assert told == {"dropped": 1}
    else:
        row = rows.t2i(long, rng(), mask_prob, 0, told)
        assert row.ids == text.encode("dark hair " * 20)[:21] and told == {"truncated": 1}
    fitting = sample(captions=(" ".join(["a"] * 21),))
    told.clear()
    assert len(rows.t2i(fitting, rng(), mask_prob, 0, told).ids) == 21 and not told


def test_each_caption_is_told_about_equally_often(text, model):
    rows = maker(text, model)
    captions = ("a face", "portrait of a person", "photo of a face")
    told = Counter(
        text.decode(rows.t2i(sample(captions=captions), rng(n), torch.tensor(1.0), 0, Counter()).ids)
        for n in range(300)
    )
    assert set(told) == set(captions) and min(told.values()) > 70  # 100 expected, 3.7 standard deviations


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_guidance_dropout_leaves_captions_out(text, model, share):
    rows = maker(text, model, guidance_dropout=share)
    empty = np.mean([not rows.t2i(sample(), rng(n), torch.tensor(1.0), 0, Counter()).ids for n in range(400)])
    assert empty == share if share in (0.0, 1.0) else abs(empty - share) < 0.09


def test_times_are_one_in_each_part(text, model):
    """The cosine schedule of one time in each twelfth of (0, 1), in random order."""
    rows = maker(text, model)
    drawn = [rows.mask_prob(rng(seed), 12) for seed in range(2)]
    for each in drawn:
        time = torch.arccos(each.double()) * 2 / torch.pi
        assert time.mul(12).floor().sort().values.tolist() == pytest.approx(list(range(12)), abs=1)
    assert drawn[0].argsort().tolist() != drawn[1].argsort().tolist()


def collated(rows, count=6, step=2, **changes):
    mask_prob = rows.mask_prob(rng(), count)
    made = [rows.t2i(sample(), rng(n), mask_prob[n], n, Counter()) for n in range(count)]
    spoken = [rows.mmu(sample(**changes), rng(n), Counter()) for n in range(2)]
    return rows.collate(made, spoken, [[5, 6, 7]], step), mask_prob


def test_masked_codes_are_the_targets(text, model):
    rows = maker(text, model)
    batch, mask_prob = collated(rows)
    first, mask = model.vocabulary.code_range[0], model.vocabulary.mask
    image = slice(model.text_slots + 1, model.text_slots + 5)
    ids, labels = batch.input_ids[:6, image], batch.labels[:6, image]
    assert (torch.where(ids == mask, labels, ids) == torch.tensor([3, 15, 0, 7]) + first).all()
    assert torch.equal(labels != IGNORE, ids == mask)
    assert (ids == mask).sum(1).tolist() == [max(1, round(4 * each.item())) for each in mask_prob]
    assert (batch.labels[:6] != IGNORE).sum() == (ids == mask).sum()
    assert torch.equal(batch.mask_prob[:6], mask_prob.float()) and batch.mask_prob[6:].tolist() == [1, 1, 1]


def test_masks_hang_on_the_step_and_the_place_alone(text, model):
    rows = maker(text, model)
    batch, mask_prob = collated(rows)
    alone = [rows.t2i(sample(), rng(n), mask_prob[n], n, Counter()) for n in (5, 2)]
    part = rows.collate(alone, [], [], 2)
    assert torch.equal(part.input_ids, batch.input_ids[[5, 2], : part.input_ids.shape[1]])
    half = [rows.t2i(sample(), rng(), torch.tensor(0.5), place, Counter()) for place in range(12)]
    masks = rows.collate(half, [], [], 2).labels != IGNORE
    assert len({tuple(each) for each in masks.tolist()}) > 2, "each row has places of its own"
    other = rows.collate(alone, [], [], 3)
    assert not torch.equal(part.input_ids, other.input_ids)


def test_a_row_of_each_task(text, model):
    rows = maker(text, model)
    features = {"identity": np.arange(6, dtype=np.float16), "semantic": np.ones((3, 5), np.float16)}
    batch, _ = collated(rows, **features)
    assert batch.task.tolist() == [0] * 6 + [1] * 3 and batch.image_start.tolist() == [25] * 6 + [2, 2, -1]
    assert batch.identity[6].tolist() == list(range(6)) and not batch.identity[[0, 8]].any()
    assert batch.semantic.shape == (9, 3, 5) and batch.semantic[6].eq(1).all() and not batch.semantic[[0, 8]].any()
    assert batch.input_ids[8, :3].tolist() == [5, 6, 7] and batch.labels[8, :4].tolist() == [6, 7, IGNORE, IGNORE]
    row = rows.mmu(sample(**features), rng(1), Counter())
    expected = mmu_batch(row.codes[None], [row.ids], row.identity[None], row.semantic[None], model, [row.answers])
    length = expected.input_ids.shape[1]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(getattr(batch, name)[7, :length], getattr(expected, name)[0])


def test_faces_without_features_have_zeros(text, model):
    rows = maker(text, model)
    mixed = [
        rows.mmu(sample(semantic=np.ones((2, 5)), identity=np.ones(6)), rng(), Counter()),
        rows.mmu(sample(), rng(), Counter()),
    ]
    batch = rows.collate([], mixed, [], 0)
    assert batch.semantic.shape == (2, 2, 5) and batch.semantic[0].all() and not batch.semantic[1].any()
    assert batch.identity.sum(1).tolist() == [6, 0]


def test_lengths_that_never_change(text, model):
    rows = maker(text, model, fixed_length=True, text_length=40, lm_length=20)
    assert rows.lengths == Lengths(caption=21, text=40, lm=20, row=47)
    short, _ = collated(rows)
    for batch in (short, rows.collate([], [], [[5, 6, 7]], 0)):
        assert {each.shape[1] for each in (batch.input_ids, batch.labels, batch.attention_mask)} == {48}
    free, _ = collated(maker(text, model, text_length=40, lm_length=20))
    length = free.input_ids.shape[1]
    assert length < 48 and torch.equal(short.input_ids[:, :length], free.input_ids)
    assert not short.attention_mask[:, length:].any() and (short.labels[:, length:] == IGNORE).all()


def test_by_default_all_rows_are_as_long_as_a_painting(text, model):
    painting = model.text_slots + model.image_tokens + 2
    assert Lengths.of(DataConfig(), model) == Lengths(model.text_slots - 3, model.text_slots - 1, painting, painting)


@pytest.mark.parametrize(
    "changes, reason, corrupt",
    [
        ({"codes": None}, "it has no codes", False),
        ({"codes": np.arange(5)}, r"its codes are \[5\] up to 4, this model's are \[4\] below 16", True),
        ({"codes": np.array([0, 1, 2, 16])}, r"its codes are \[4\] up to 16", True),
        ({"identity": np.ones(5)}, r"its identity features are \[5\], this model's \[6\]", True),
        ({"semantic": np.ones((2, 4))}, r"its semantic features are \[2, 4\], this model's \[2, 5\]", True),
        ({"identity": np.full(6, np.nan)}, "its identity features are not finite", True),
        ({"conversations": ((("  ", "dark"),),)}, "a text of it is empty", False),
    ],
)
def test_a_sample_that_cannot_be_a_row(text, model, changes, reason, corrupt):
    with pytest.raises(SampleError, match=rf"^file at 3: .*{reason}") as caught:
        maker(text, model, describe=()).mmu(sample(**changes), rng(), Counter())
    assert caught.value.corrupt == corrupt


def test_a_face_without_caption_is_not_painted(text, model):
    with pytest.raises(SampleError, match="it has no caption"):
        maker(text, model).t2i(sample(captions=()), rng(), torch.tensor(0.5), 0, Counter())


@pytest.mark.parametrize(
    "batch, mix, expected",
    [
        (44, MixConfig(), (24, 20, 0)),
        (10, MixConfig(1, 1, 1), (4, 3, 3)),
        (7, MixConfig(2, 1, 1), (3, 2, 2)),
        (8, MixConfig(0.5, 0.4, 0.1), (4, 3, 1)),
        (1, MixConfig(1, 0, 0), (1, 0, 0)),
    ],
)
def test_rows_a_step(batch, mix, expected):
    data = dataclasses.replace(DataConfig(), batch=batch, mix=mix)
    assert tuple(data.counts.values()) == expected and sum(expected) == batch
