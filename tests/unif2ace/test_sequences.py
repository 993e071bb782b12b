"""Token by token: the two layouts, what is a target, and who sees whom."""

import pytest
import tiny
import torch

from unif2ace.configs import MMU, T2I
from unif2ace.errors import UserError
from unif2ace.model.sequences import IGNORE, Batch, lm_batch, mmu_batch, t2i_batch, t2i_prompts
from unif2ace.model.visibility import Visibility

V = tiny.CONFIG.vocabulary
PAD, SOI, EOI, T2I_TOKEN, MMU_TOKEN, MASK = V.pad, V.start_of_image, V.end_of_image, V.t2i, V.mmu, V.mask
C = V.code_range[0]
END = tiny.END


def test_prompts_are_padded_on_the_left():
    rows = t2i_prompts([[11, 12, 13, 14], [11], []], END, tiny.CONFIG)
    assert rows.tolist() == [
        [T2I_TOKEN, END, 11, 12, 13, 14, END],
        [PAD, PAD, PAD, T2I_TOKEN, END, 11, END],
        [PAD, PAD, PAD, PAD, T2I_TOKEN, END, END],
    ]


def test_a_prompt_that_does_not_fit_is_the_users_to_shorten():
    with pytest.raises(UserError, match="5 tokens.*at most 4"):
        t2i_prompts([[1], [1, 2, 3, 4, 5]], END, tiny.CONFIG)


def test_a_t2i_row_token_by_token():
    prompts = t2i_prompts([[11, 12], []], END, tiny.CONFIG)
    codes = torch.tensor([[C + 1, MASK, MASK, C + 4], [MASK, C, MASK, MASK]])
    targets = torch.tensor([[IGNORE, C + 2, C + 3, IGNORE], [C + 9, IGNORE, C + 8, C + 7]])
    batch = t2i_batch(prompts, codes, tiny.CONFIG, targets)
    assert batch.input_ids.tolist() == [
        [PAD, PAD, T2I_TOKEN, END, 11, 12, END, SOI, C + 1, MASK, MASK, C + 4, EOI],
        [PAD, PAD, PAD, PAD, T2I_TOKEN, END, END, SOI, MASK, C, MASK, MASK, EOI],
    ]
    none = [IGNORE] * 8  # the targets stand where the codes stand: a masked position predicts its own code
    assert batch.labels.tolist() == [
        [*none, IGNORE, C + 2, C + 3, IGNORE, IGNORE],
        [*none, C + 9, IGNORE, C + 8, C + 7, IGNORE],
    ]
    assert batch.attention_mask.tolist() == [[False] * 2 + [True] * 11, [False] * 4 + [True] * 9]
    assert batch.task.tolist() == [T2I, T2I] and batch.image_start.tolist() == [8, 8]
    assert batch.mask_prob.tolist() == [0.5, 0.75]  # what the codes show, unless it is given
    assert t2i_batch(prompts, codes, tiny.CONFIG, targets, torch.tensor([0.4, 0.8])).mask_prob.tolist() == [
        pytest.approx(0.4),
        pytest.approx(0.8),
    ]
    assert (t2i_batch(prompts, codes, tiny.CONFIG).labels == IGNORE).all()


def test_an_mmu_row_token_by_token():
    codes = C + torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    identity, semantic = torch.randn(2, 6), torch.randn(2, 4, 5)
    answers = [[False, False, True, True, True], [False, True, True]]
    batch = mmu_batch(codes, [[11, 12, 13, 14, END], [21, 22, END]], identity, semantic, tiny.CONFIG, answers)
    assert batch.input_ids.tolist() == [
        [MMU_TOKEN, SOI, C + 1, C + 2, C + 3, C + 4, EOI, 11, 12, 13, 14, END],
        [MMU_TOKEN, SOI, C + 5, C + 6, C + 7, C + 8, EOI, 21, 22, END, PAD, PAD],
    ]
    none = [IGNORE] * 6  # a target stands one place before its token: the row before a token predicts it
    assert batch.labels.tolist() == [
        [*none, IGNORE, IGNORE, 13, 14, END, IGNORE],
        [*none, IGNORE, 22, END, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.attention_mask.tolist() == [[True] * 12, [True] * 10 + [False] * 2]
    assert batch.task.tolist() == [MMU, MMU] and batch.image_start.tolist() == [2, 2]
    assert batch.mask_prob.tolist() == [1, 1]
    assert batch.identity is identity and batch.semantic is semantic
    assert (mmu_batch(codes, [[1], [2]], identity, semantic, tiny.CONFIG).labels == IGNORE).all()


def test_an_answer_may_begin_right_after_the_image():
    """The first text token is predicted from <eoi>."""
    batch = mmu_batch(torch.full((1, 4), C), [[11]], torch.zeros(1, 6), torch.zeros(1, 4, 5), tiny.CONFIG, [[True]])
    assert batch.input_ids[0, 6] == EOI and batch.labels[0].tolist() == [IGNORE] * 6 + [11, IGNORE]


def test_joined_rows_keep_everything_and_are_padded_on_the_right():
    parts = tiny.double(tiny.t2i(), tiny.mmu())
    joined = Batch.join(parts, PAD)
    row = 0
    for part in parts:
        length = part.input_ids.shape[1]
        for i in range(len(part.task)):
            for name, fill in (("input_ids", PAD), ("attention_mask", False), ("labels", IGNORE)):
                assert torch.equal(getattr(joined, name)[row, :length], getattr(part, name)[i])
                assert (getattr(joined, name)[row, length:] == fill).all()
            for name in ("task", "image_start", "mask_prob", "identity"):
                assert torch.equal(getattr(joined, name)[row], getattr(part, name)[i])
            features = part.semantic.shape[1]  # t2i rows have none
            assert torch.equal(joined.semantic[row, :features], part.semantic[i])
            assert not joined.semantic[row, features:].any()
            row += 1
    assert row == len(joined.task) and joined.input_ids.shape == joined.attention_mask.shape == joined.labels.shape


def visible(batch: Batch, image_tokens: int) -> torch.Tensor:
    seen = Visibility(batch.attention_mask, batch.task, batch.image_start, image_tokens)
    return seen.mask(batch.input_ids.shape[1])


def expected_to_see(batch: Batch, image_tokens: int, row: int, query: int, key: int) -> bool:
    """The prose: t2i text is causal, <soi> .. <eoi> see everything; mmu is causal and all see the prefix to <eoi>."""
    soi, eoi = batch.image_start[row] - 1, batch.image_start[row] + image_tokens
    if not batch.attention_mask[row, key]:
        return False
    if batch.task[row] == T2I and soi <= query <= eoi:
        return True
    if batch.task[row] == MMU and key <= eoi:
        return True
    return key <= query


def assert_mask_is_as_written(batch: Batch, image_tokens: int) -> None:
    mask = visible(batch, image_tokens)
    rows, length = batch.input_ids.shape
    assert mask.shape == (rows, 1, length, length) and mask.dtype == torch.bool
    for row in range(rows):
        for query in range(length):
            if not batch.attention_mask[row, query]:
                assert mask[row, 0, query, query]  # a softmax over nothing would be NaN
                continue
            for key in range(length):
                assert mask[row, 0, query, key] == expected_to_see(batch, image_tokens, row, query, key)


def test_the_mask_of_a_mixed_batch_is_as_written():
    batch = tiny.mixed()
    assert_mask_is_as_written(batch, tiny.CONFIG.image_tokens)
    mask = visible(batch, tiny.CONFIG.image_tokens)[:, 0]
    others = ~torch.eye(mask.shape[1], dtype=torch.bool)
    assert not (mask & others & ~batch.attention_mask[:, None, :]).any(), "padding is seen by nobody but itself"
    t2i_image = batch.image_start[0]
    assert not mask[0, : t2i_image - 1, t2i_image - 1 :].any(), "t2i text never sees the image"


def test_every_row_goes_by_its_own_image():
    """Image starts that differ from row to row, as no layout here makes them, but another may."""
    torch.manual_seed(0)
    rows, length, image_tokens = 6, 14, 4
    batch = tiny.mixed()
    custom = tiny.replaced(
        batch,
        input_ids=torch.zeros(rows, length, dtype=torch.long),
        task=torch.tensor([MMU, MMU, MMU, T2I, T2I, T2I]),
        attention_mask=torch.rand(rows, length) < 0.8,
        image_start=torch.tensor([2, 5, 1, 9, 4, 6]),
    )
    assert_mask_is_as_written(custom, image_tokens)


def test_a_batch_moves_whole():
    moved = tiny.mixed().to("meta")
    tensors = [*vars(moved).values(), *moved.layout]
    assert all(value.is_meta for value in tensors if isinstance(value, torch.Tensor))
    assert [type(value) for value in moved.layout] == [torch.Tensor, type(None), torch.Tensor, torch.Tensor, bool]


def test_a_batch_keeps_where_things_are():
    """Rows of each kind: what a layout says is what the batch's tensors say."""
    lm = tiny.double(lm_batch([[11, 12, 13], [14]], tiny.CONFIG))
    batch = Batch.join([*tiny.double(tiny.t2i()), *lm, *tiny.double(tiny.mmu())], PAD).to("cpu")
    layout = batch.layout
    assert layout.images.tolist() == [0, 1, 2, 5, 6, 7] and layout.plain
    assert layout.t2i.tolist() == [0, 1, 2] and layout.mmu.tolist() == [3, 4, 5]
    assert torch.equal(layout.real, batch.attention_mask.flatten().nonzero()[:, 0])


def test_plain_text_token_by_token():
    batch = lm_batch([[11, 12, 13], [14]], tiny.CONFIG)
    assert batch.input_ids.tolist() == [[11, 12, 13], [14, PAD, PAD]]
    assert batch.labels.tolist() == [[12, 13, IGNORE], [IGNORE] * 3]
    assert batch.task.tolist() == [MMU, MMU] and batch.image_start.tolist() == [-1, -1]
