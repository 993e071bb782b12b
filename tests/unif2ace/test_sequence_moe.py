"""The sequence-level experts against a loop over samples and experts, and what each may and may not depend on."""

import pytest
import tiny
import torch

from unif2ace.configs import MMU, T2I, SequenceMoEConfig
from unif2ace.model.sequence_moe import CLIP, EXPERTS, FACE, NOISE, Injection, NoiseLevel, Resampler, SequenceMoE
from unif2ace.model.sequences import Layout

N, D = tiny.CONFIG.image_tokens, tiny.CONFIG.hidden_size
TASK = torch.tensor([T2I, MMU, MMU, T2I, MMU, T2I, T2I, MMU])
ROUTER_COLUMN = {"noise": 2, "zero": 1, "clip": 4, "face": 5, "mmu copy": 6, "other mmu copy": 7}


def lively(config=tiny.CONFIG, seed=0) -> SequenceMoE:
    torch.manual_seed(seed)
    module = SequenceMoE(config).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    return module


def inputs(seed=0):
    torch.manual_seed(seed)
    return torch.randn(len(TASK), N, D, dtype=torch.float64), torch.randn(len(TASK), 3, N, D, dtype=torch.float64)


def by_hand(module: SequenceMoE, config, x, task, injected):
    """Each sample, each of its experts: y = sum over the chosen of weight * E(x)."""
    slot = {"noise": NOISE, "clip": CLIP, "face": FACE}
    exists = {"clip": config.sequence_moe.clip, "face": config.sequence_moe.face}
    y = []
    for x_b, task_b, injected_b in zip(x, task.tolist(), injected):
        scores = torch.softmax(module.router(module.norm(x_b.mean(0)))[4 * task_b : 4 * task_b + 4], 0)
        weight, chosen = scores.topk(config.sequence_moe.top_k)
        y_b = torch.zeros_like(x_b)
        for w, expert in zip(weight / weight.sum(), chosen.tolist()):
            name = EXPERTS[task_b][expert]
            if name == "copy" or not exists.get(name, True):
                y_b = y_b + w * x_b
            elif name != "zero":
                gate = torch.sigmoid(module.gate[slot[name]])
                y_b = y_b + w * (gate * x_b + (1 - gate) * injected_b[slot[name]])
        y.append(y_b)
    return torch.stack(y)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("clip,face", [(True, True), (False, True), (True, False), (False, False)])
def test_a_layer_is_the_loop_over_samples_and_experts(top_k, clip, face):
    config = tiny.config(sequence_moe=SequenceMoEConfig(top_k=top_k, clip=clip, face=face, latents=2))
    module = lively(config)
    x, injected = inputs()
    y, routing = module(x, TASK, injected)
    torch.testing.assert_close(y, by_hand(module, config, x, TASK, injected), rtol=2e-6, atol=2e-6)
    assert y.std() > 0.1 and routing.expert.shape == (len(TASK), top_k)


def test_a_sample_uses_its_own_tasks_experts():
    module = lively()
    x, injected = inputs()
    _, routing = module(x, TASK, injected)
    assert (routing.expert // 4 == TASK[:, None]).all()
    assert torch.equal(routing.counts.view(2, 4).sum(1), 2 * torch.tensor([4, 4]))
    changed = x.clone()
    changed[TASK == MMU] += 1
    _, other = module(changed, TASK, injected)
    assert torch.equal(other.weight[TASK == T2I], routing.weight[TASK == T2I])
    assert not torch.equal(other.weight[TASK == MMU], routing.weight[TASK == MMU])


def test_the_order_of_experts_is_the_papers():
    assert EXPERTS == (("copy", "zero", "noise", "copy"), ("clip", "face", "copy", "copy"))


@pytest.mark.parametrize("clip,face", [(False, True), (True, False), (False, False)])
def test_a_missing_expert_is_a_copy(clip, face):
    """Routed to the one that is missing, a sample comes back as it went in, whatever would have been injected."""
    config = tiny.config(sequence_moe=SequenceMoEConfig(top_k=1, clip=clip, face=face))
    module = lively(config)
    x, injected = inputs()
    for name, exists in (("clip", clip), ("face", face)):
        with torch.no_grad():
            module.router.bias.zero_()
            module.router.bias[ROUTER_COLUMN[name]] = 1000
        y, _ = module(x, TASK, injected)
        same = [torch.equal(a, b) for a, b in zip(y[TASK == MMU], x[TASK == MMU])]
        assert all(same) if not exists else not any(same)


def test_without_encoders_there_are_no_resamplers_for_them():
    config = tiny.config(sequence_moe=SequenceMoEConfig(clip=False, face=False))
    assert Injection(config).clip is None and Injection(config).face is None
    batch = tiny.mixed()
    layout = Layout.of(batch.attention_mask, batch.task, batch.image_start)
    out = Injection(config).double()(layout, batch.mask_prob, batch.identity, batch.semantic)
    assert out[:, NOISE].abs().sum() > 0 and not out[:, [CLIP, FACE]].any()


def test_what_is_injected_depends_on_the_tasks_own_features_alone():
    """Noise on the share masked, CLIP on the semantic features, face on the identity; nothing for the other task."""
    torch.manual_seed(0)
    injection, batch = Injection(tiny.CONFIG).double(), tiny.mixed()

    def out(**changes):
        changed = tiny.replaced(batch, **changes)
        layout = Layout.of(changed.attention_mask, changed.task, changed.image_start)
        return injection(layout, changed.mask_prob, changed.identity, changed.semantic)

    before = out()
    t2i, mmu = batch.task == T2I, batch.task == MMU
    assert not before[t2i][:, [CLIP, FACE]].any() and not before[mmu][:, NOISE].any()
    for field, slot, rows in (("mask_prob", NOISE, t2i), ("semantic", CLIP, mmu), ("identity", FACE, mmu)):
        moved = (out(**{field: getattr(batch, field) * 0.5 + 0.1}) - before).abs().sum((2, 3)) > 0
        expected = torch.zeros_like(moved)
        expected[rows, slot] = True
        assert torch.equal(moved, expected), field


@pytest.mark.parametrize("single,count", [(True, 1), (False, 3), (False, 1)])
def test_a_resampler_is_attention_of_learned_queries(single, count):
    torch.manual_seed(0)
    heads, latents, channels = 4, 3, 5
    resampler = Resampler(channels, D, heads, N, latents, single=single).double()
    features = torch.randn(2, count, channels, dtype=torch.float64)
    tokens = latents if single else 1
    for row, out in zip(features, resampler(features)):
        keys, values = resampler.key_value(
            resampler.norm(torch.cat([resampler.project(each).view(tokens, D) for each in row]))
        ).chunk(2, -1)
        assert len(keys) == count * tokens
        parts = []
        for h in range(heads):
            own = slice(h * D // heads, (h + 1) * D // heads)
            score = resampler.queries[:, own] @ keys[:, own].T / (D // heads) ** 0.5
            parts.append(score.softmax(-1) @ values[:, own])
        torch.testing.assert_close(out, resampler.out(torch.cat(parts, -1)))
    assert resampler(features[:0]).shape == (0, N, D)


def test_noise_levels_that_the_model_must_tell_apart_are_apart():
    level = NoiseLevel()
    embedded = level(torch.arange(1, 65) / 64)[:, 0]
    assert embedded.shape == (64, 64) and embedded.abs().max() <= 1
    distance = torch.cdist(embedded, embedded) + 100 * torch.eye(64)
    assert distance.min() > 0.1


@pytest.mark.parametrize("kind", [Injection, SequenceMoE])
def test_a_config_without_sequence_experts_is_named(kind):
    with pytest.raises(ValueError, match="sequence_moe"):
        kind(tiny.config(sequence_moe=None))


def test_the_gates_start_half_way_and_are_learned():
    module = SequenceMoE(tiny.config(sequence_moe=SequenceMoEConfig(top_k=4))).double()
    x, injected = inputs()
    module(x, TASK, injected)[0].square().sum().backward()
    assert torch.equal(torch.sigmoid(module.gate), torch.full((3,), 0.5, dtype=torch.float64))
    assert (module.gate.grad != 0).all() and (module.router.weight.grad.abs().sum(1) > 0).all()
