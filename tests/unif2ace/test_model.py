"""The transformer: what its states may depend on, that every weight learns, and that the loss is what it says."""

import dataclasses

import pytest
import tiny
import torch
from torch.nn import functional as F

from unif2ace.configs import MMU, T2I, LossConfig, SequenceMoEConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import IGNORE, Batch

V = tiny.CONFIG.vocabulary
N = tiny.CONFIG.image_tokens
PARALLEL = tiny.config(parallel_block=True)
VARIANTS = {
    "full": tiny.CONFIG,
    "parallel": PARALLEL,
    "no token experts": tiny.config(token_moe=None),
    "no sequence experts": tiny.config(sequence_moe=None),
    "dense": tiny.config(token_moe=None, sequence_moe=None),
    "no encoders": tiny.config(sequence_moe=SequenceMoEConfig(clip=False, face=False)),
    "experts beside the FFN": tiny.config(
        token_moe=dataclasses.replace(tiny.CONFIG.token_moe, shared_width=0, dense=True)
    ),
    "Show-o": tiny.config(token_moe=None, sequence_moe=None, parallel_block=True, image_positions=False),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request):
    return request.param


def hidden(model: UniF2aceForConditionalGeneration, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**vars(batch)).last_hidden_state


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def moved(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B] how far each row moved."""
    return (a - b).abs().flatten(1).amax(1)


def test_t2i_text_does_not_depend_on_the_image(config):
    """So its keys and values are the same in every sampling step, and may be cached."""
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    t2i, soi = batch.task == T2I, int(batch.image_start[0]) - 1
    tokens = batch.input_ids.clone()
    image = slice(soi + 1, soi + 1 + N)
    tokens[t2i, image] = V.code_range[0] + (tokens[t2i, image] + 3) % V.codes
    other = tiny.replaced(batch, input_ids=tokens, mask_prob=batch.mask_prob * 0.3)
    before, after = hidden(model, batch)[t2i], hidden(model, other)[t2i]
    assert_same(before[:, :soi], after[:, :soi])
    assert (moved(before[:, soi:], after[:, soi:]) > 1e-3).all()


def test_the_image_depends_on_the_caption(config):
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    tokens = batch.input_ids.clone()
    tokens[0, int(batch.image_start[0]) - 3] += 1
    after = moved(hidden(model, batch), hidden(model, tiny.replaced(batch, input_ids=tokens)))
    assert after[0] > 1e-3 and after[1:].max() < 1e-9, "rows of a batch do not mix"


def test_later_text_changes_nothing_before_it_in_mmu(config):
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    mmu = (batch.task == MMU).nonzero()[:, 0]
    ends = batch.attention_mask[mmu].sum(1)
    tokens = batch.input_ids.clone()
    tokens[mmu, ends - 1] = 1 + tokens[mmu, ends - 1] % (V.text - 1)
    before, after = hidden(model, batch), hidden(model, tiny.replaced(batch, input_ids=tokens))
    for row, end in zip(mmu, ends):
        assert_same(before[row, : end - 1], after[row, : end - 1])
        assert (before[row, end - 1] - after[row, end - 1]).abs().max() > 1e-3


def test_every_mmu_row_sees_the_whole_image(config):
    """Full attention over the prefix: the last code reaches <mmu>, the very first position, and all the text."""
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    mmu = batch.task == MMU
    tokens = batch.input_ids.clone()
    tokens[mmu, 1 + N] = V.code_range[0] + (tokens[mmu, 1 + N] + 3) % V.codes
    before, after = hidden(model, batch)[mmu], hidden(model, tiny.replaced(batch, input_ids=tokens))[mmu]
    assert ((before - after).abs().amax(-1)[batch.attention_mask[mmu]] > 1e-6).all()


def test_what_stands_on_padding_changes_nothing(config):
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    tokens = torch.where(batch.attention_mask, batch.input_ids, (3 + torch.arange(batch.input_ids.shape[1])) % V.text)
    assert not torch.equal(tokens, batch.input_ids)
    after = hidden(model, tiny.replaced(batch, input_ids=tokens))
    assert_same(hidden(model, batch)[batch.attention_mask], after[batch.attention_mask])


def test_more_padding_on_the_right_changes_nothing(config):
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    longer = {"input_ids": V.pad, "attention_mask": False, "labels": IGNORE}
    longer = {name: F.pad(getattr(batch, name), (0, 8), value=value) for name, value in longer.items()}
    after = hidden(model, tiny.replaced(batch, **longer))[:, : batch.input_ids.shape[1]]
    assert_same(hidden(model, batch)[batch.attention_mask], after[batch.attention_mask])


def route_mmu_to(model: UniF2aceForConditionalGeneration, expert: int) -> None:
    with torch.no_grad():
        for block in model.blocks:
            block.sequence.router.bias[4 + expert] = 1e4


@pytest.mark.parametrize("field,expert", [("semantic", 0), ("identity", 1)])
def test_encoders_reach_a_sample_through_their_expert_alone(field, expert):
    """CLIP and face: mmu rows that are routed to the expert, and nothing else."""
    config = tiny.config(sequence_moe=dataclasses.replace(tiny.CONFIG.sequence_moe, top_k=1))
    batch = tiny.mixed(config=config)
    other = tiny.replaced(batch, **{field: torch.randn_like(getattr(batch, field))})
    mmu = batch.task == MMU
    for chosen in range(4):
        model = tiny.lively(config)
        route_mmu_to(model, chosen)
        moves = moved(hidden(model, batch), hidden(model, other))
        assert moves[~mmu].max() < 1e-9
        assert (moves[mmu] > 1e-3).all() if chosen == expert else moves[mmu].max() < 1e-9


def test_one_samples_identity_is_not_anothers():
    model, batch = tiny.lively(), tiny.mixed()
    route_mmu_to(model, 1)
    identity = batch.identity.clone()
    identity[4] += 1
    moves = moved(hidden(model, batch), hidden(model, tiny.replaced(batch, identity=identity)))
    assert moves[4] > 1e-3 and moves[[0, 1, 2, 3, 5]].max() < 1e-9


def test_without_a_face_expert_nothing_depends_on_the_identity():
    config = tiny.config(sequence_moe=SequenceMoEConfig(face=False))
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    other = tiny.replaced(batch, identity=torch.randn_like(batch.identity))
    assert torch.equal(hidden(model, batch), hidden(model, other))


def test_tokens_go_to_the_experts_of_their_rows_task():
    model, batch = tiny.lively(), tiny.mixed()
    output = model(**vars(batch))
    assert len(output.token_routings) == len(output.sequence_routings) == tiny.CONFIG.num_hidden_layers
    task = batch.task[:, None].expand(batch.input_ids.shape)[batch.attention_mask]
    for routing in output.token_routings:
        assert len(routing.expert) == batch.attention_mask.sum() < batch.attention_mask.numel(), (
            "padding is nobody's token"
        )
        routed = routing.expert[:, :2]
        assert ((routed >= 3).all(1) == (task == MMU)).all() and ((routed < 3).all(1) == (task == T2I)).all()


def test_image_hidden_is_the_images_part():
    model, batch = tiny.lively(), tiny.mixed()
    output = model(**vars(batch))
    picked = model.image_hidden(output.last_hidden_state, batch.image_start)
    for row, start in enumerate(batch.image_start.tolist()):
        assert torch.equal(picked[row], output.last_hidden_state[row, start : start + N])


def test_image_positions_tell_equal_codes_apart():
    model, batch = tiny.lively(), tiny.mixed()
    before = hidden(model, batch)
    with torch.no_grad():
        model.image_position[2] += torch.randn(tiny.CONFIG.hidden_size)
    assert (moved(before, hidden(model, batch)) > 1e-3).all()


# ------------------------------------------------------------------------------------------------------- the loss


def test_gradients_reach_every_parameter(config):
    """Where every expert is chosen, since K is all that the smallest group has; no parameter is an exception."""
    if config.token_moe is not None:
        config = config.replace(token_moe=dataclasses.replace(config.token_moe, top_k=3))
    if config.sequence_moe is not None:
        config = config.replace(sequence_moe=dataclasses.replace(config.sequence_moe, top_k=4))
    torch.manual_seed(0)
    model, batch = UniF2aceForConditionalGeneration(config).double(), tiny.mixed(config=config, rows=4)
    tiny.loss(model, batch)[0].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    if config.token_moe is not None:
        for block in model.blocks:
            assert (block.experts.experts_w_in.grad[:3].abs().sum((1, 2)) > 0).all(), "an expert that nobody chose"


def losses_by_hand(model: UniF2aceForConditionalGeneration, batch: Batch) -> dict[str, torch.Tensor]:
    """Both terms of D3Diff and next-token prediction, from the logits, row by row."""
    logits = model.head(model(**vars(batch)).last_hidden_state)
    first, stop = V.code_range
    mask, score, text, samples = [], [], [], 0
    for row, task in enumerate(batch.task.tolist()):
        targets = [(place, label) for place, label in enumerate(batch.labels[row].tolist()) if label != IGNORE]
        if task == MMU:
            text += [-logits[row, place].log_softmax(-1)[label] for place, label in targets]
            continue
        samples += 1
        m = batch.mask_prob[row]
        weight = torch.pi / 2 * (1 - m * m).sqrt() / m  # the cosine schedule's m' / m
        for place, label in targets:
            ce = -logits[row, place, first:stop].log_softmax(-1)[label - first]
            mask.append(ce)
            score.append(weight * ce)
    zero = logits.new_zeros(())
    return {
        "mask": torch.stack(mask).mean() if mask else zero,
        "score": torch.stack(score).sum() / samples if score else zero,  # a sum over a sample, a mean over samples
        "mmu": torch.stack(text).mean() if text else zero,
    }


LOSSES = {
    "paper": LossConfig(),
    "mask only": LossConfig(alpha=0.0),
    "score only": LossConfig(mask=0.0),
    "weighted": LossConfig(alpha=0.5, mask=0.3, t2i=2.0, mmu=0.7),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_loss_is_what_its_terms_come_to_by_hand(loss):
    config = tiny.config(loss=loss)
    model, batch = tiny.lively(config), tiny.mixed(config=config)
    total, terms = tiny.loss(model, batch)
    expected = losses_by_hand(model, batch)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), check_dtype=False)
    output = model(**vars(batch))
    balance = sum(each.balance_loss for each in output.token_routings + output.sequence_routings)
    torch.testing.assert_close(terms["balance"], balance.detach(), check_dtype=False)
    d3diff_loss = loss.mask * expected["mask"] + loss.alpha * expected["score"]
    torch.testing.assert_close(total, loss.t2i * d3diff_loss + loss.mmu * expected["mmu"] + balance, check_dtype=False)


def test_a_switched_off_term_has_no_gradient():
    """alpha = 0 and mask = 0 leave the other term's gradient; both leave none at the codes' head rows."""
    first, stop = V.code_range

    def gradient(**changes):
        config = tiny.config(loss=LossConfig(mmu=0.0, **changes))
        model = tiny.lively(config)
        tiny.loss(model, tiny.mixed(config=config))[0].backward()
        return model.head.weight.grad[first:stop]

    mask, score, both = gradient(alpha=0.0), gradient(alpha=1.0, mask=0.0), gradient(alpha=1.0)
    torch.testing.assert_close(mask + score, both)
    assert mask.abs().max() > 1e-4 and score.abs().max() > 1e-4 and not torch.allclose(mask, score)
    assert not gradient(alpha=0.0, mask=0.0).any()


def test_the_joint_loss_is_the_two_tasks_losses():
    """A mixed batch costs what its t2i rows and its mmu rows cost alone. No experts, whose balance counts padding."""
    config = tiny.config(token_moe=None, sequence_moe=None)
    model = tiny.lively(config)
    parts = tiny.double(tiny.t2i(config=config), tiny.mmu((5, 2, 7, 4, 4), config=config))
    together, terms = tiny.loss(model, Batch.join(parts, V.pad))
    (t2i, t2i_terms), (mmu, mmu_terms) = (tiny.loss(model, part) for part in parts)
    torch.testing.assert_close(together, t2i + mmu)
    for name in ("mask", "score", "mask_accuracy"):
        torch.testing.assert_close(terms[name], t2i_terms[name])
        assert mmu_terms[name] == 0
    for name in ("mmu", "mmu_accuracy"):
        torch.testing.assert_close(terms[name], mmu_terms[name])
        assert t2i_terms[name] == 0


@pytest.mark.parametrize("make", [tiny.t2i, tiny.mmu])
def test_a_batch_of_one_task_trains(config, make):
    model = tiny.lively(config)
    (batch,) = tiny.double(make(config=config))
    total, terms = tiny.loss(model, batch)
    total.backward()
    assert total.isfinite() and terms["mask" if make is tiny.t2i else "mmu"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_accuracy_counts_the_targets_ranked_first():
    model, batch = tiny.lively(), tiny.mixed()
    _, terms = tiny.loss(model, batch)
    logits = model.head(model(**vars(batch)).last_hidden_state)
    first, stop = V.code_range
    wanted = batch.labels != IGNORE
    generates = (batch.task == T2I)[:, None].expand_as(wanted)
    codes = logits[..., first:stop].argmax(-1) + first
    for name, rows, best in (
        ("mask_accuracy", wanted & generates, codes),
        ("mmu_accuracy", wanted & ~generates, logits.argmax(-1)),
    ):
        expected = (best == batch.labels)[rows].double().mean()
        torch.testing.assert_close(terms[name].double(), expected)


def test_readings_of_the_score_are_passed_on():
    readings = ("radd", "bayes", "unnormalized", "full_vocab")
    configs = [tiny.config(loss=LossConfig(alpha=1.0, score=reading)) for reading in readings]
    losses = [tiny.loss(tiny.lively(config), tiny.mixed(config=config))[0].item() for config in configs]
    assert len({round(loss, 6) for loss in losses}) == len(readings)


@pytest.mark.parametrize("changes", [{"schedule": "log_linear"}, {"max_weight": 0.5}])
def test_the_weights_of_the_score_are_the_configs(changes):
    config = tiny.config(loss=LossConfig(alpha=1.0, mask=0.0, mmu=0.0, **changes))
    usual = tiny.config(loss=LossConfig(alpha=1.0, mask=0.0, mmu=0.0))
    (batch,) = tiny.double(tiny.t2i())
    scores = [tiny.loss(tiny.lively(each), batch)[1]["score"].item() for each in (config, usual)]
    assert abs(scores[0] - scores[1]) > 0.1


def test_bf16_autocast_stays_near_float32(config):
    """Forward and backward under the demo's autocast, experts included."""
    torch.manual_seed(3)  # a start at which no choice of an expert is so close that rounding turns it
    model, batch = UniF2aceForConditionalGeneration(config), tiny.single(tiny.mixed(config=config))
    exact = tiny.loss(model, batch)[0]
    exact.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny.loss(model, batch)[0]
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert abs(rounded.item() - exact.item()) < 0.02 * exact.item()
    gradients = [(model.get_parameter(name).grad, grad) for name, grad in wanted.items()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad, _ in gradients)
    a, b = (torch.cat([pair[i].flatten() for pair in gradients]) for i in (0, 1))
    assert F.cosine_similarity(a, b, dim=0) > 0.98


@pytest.mark.gpu
def test_a_training_step_on_cuda_waits_for_nothing(config, no_wait):
    """Where things are in a batch was found before it left the host."""
    model, batch = UniF2aceForConditionalGeneration(config).cuda(), tiny.single(tiny.mixed(config=config)).to("cuda")
    for _ in range(2):
        model(**vars(batch)).loss.backward()
    with no_wait():
        model(**vars(batch)).loss.backward()
