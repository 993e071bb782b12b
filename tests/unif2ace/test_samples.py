"""Samples of a model in training: they are what the model gives otherwise, and the training does not notice them."""

import copy
import json
import multiprocessing
import traceback
from datetime import timedelta

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.generation.image import paint
from unif2ace.generation.reading import Faces
from unif2ace.generation.text import answer_codes
from unif2ace.model.painting import PaintSettings, paint_prompts
from unif2ace.model.sequences import Batch
from unif2ace.training import samples
from unif2ace.training.samples import write_samples

PROMPTS, QUESTIONS = ["a person with light hair", "a person"], ["is the mouth open ?", "what is the hair like ?"]
QUICK = PaintSettings(steps=2)


@pytest.fixture
def checkpoint(untrained):
    return Checkpoint.load(untrained)


def two_faces(config):
    draw = torch.Generator().manual_seed(5)
    return Faces(
        torch.randint(config.vocabulary.codes, (2, config.image_tokens), generator=draw),
        torch.nn.functional.normalize(torch.randn(2, config.identity, generator=draw), dim=1),
        torch.randn(2, config.image_tokens, config.semantic, generator=draw),
    )


def sample(checkpoint, folder, **changes):
    given = {"step": 7, "prompts": PROMPTS, "questions": QUESTIONS, "faces": two_faces(checkpoint.model.config)}
    given |= {"settings": QUICK, "max_tokens": 3, **changes}
    return write_samples(checkpoint.model, checkpoint.text_tokenizer, folder, **given)


def test_they_are_what_the_checkpoint_paints_and_says(checkpoint, tmp_path):
    folder = samples.folder_of(tmp_path, 7)
    checkpoint.model.train()
    assert sample(checkpoint, folder) and folder.name == "step-00000007" and folder.parent.name == "samples"
    checkpoint.model.eval()
    wanted = paint(checkpoint, PROMPTS, QUICK)
    assert np.array_equal(np.asarray(Image.open(folder / "paintings.png")), np.concatenate(list(wanted), axis=1))
    faces = two_faces(checkpoint.model.config)
    words = json.loads((folder / "samples.json").read_text())
    assert (words["step"], words["prompts"]) == (7, PROMPTS)
    asked = [(each["image"], each["question"]) for each in words["answers"]]
    assert asked == [(face, question) for face in (0, 1) for question in QUESTIONS]
    every = faces.at(torch.tensor([0, 0, 1, 1]))
    said = answer_codes(checkpoint, every.codes, every.identity, every.semantic, QUESTIONS * 2, max_tokens=3)
    assert [each["answer"] for each in words["answers"]] == said
    assert Image.open(folder / "faces.png").size == (2 * 64, 64)
    assert {each.name for each in folder.iterdir()} == {"paintings.png", "faces.png", "samples.json"}


def train(model, batches, between):
    """Losses of training steps whose noise is drawn from the global state, and the weights after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    model.norm.eval()  # a part that stands still
    losses = []
    for batch in batches:
        noise = 0.01 * torch.randn_like(batch.identity)
        loss = model(**vars(tiny.replaced(batch, identity=batch.identity + noise))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        between()
    return losses, model.state_dict(), [module.training for module in model.modules()], torch.random.get_rng_state()


@pytest.fixture
def drawing(monkeypatch):
    """A painting that draws from the global state, as one may; the modes that it found."""
    found = []

    def painting(model, *arguments):
        torch.rand(3)
        found.append(model.training)
        return paint_prompts(model, *arguments)

    monkeypatch.setattr(samples, "paint_prompts", painting)
    return found


def test_training_does_not_notice_them(checkpoint, tmp_path, drawing):
    batches = [tiny.single(tiny.mixed(seed, checkpoint.model.config)) for seed in range(3)]
    runs, taken = [], []
    for on in (True, False):
        own = Checkpoint(copy.deepcopy(checkpoint.model), checkpoint.processor)
        torch.manual_seed(3)
        runs.append(train(own.model, batches, (lambda own=own: taken.append(sample(own, tmp_path))) if on else int))
    (losses, weights, modes, state), (other_losses, other_weights, other_modes, other_state) = runs
    assert taken == [True] * 3 and len(set(losses)) == 3 and drawing == [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(losses, other_losses)) and torch.equal(state, other_state)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights) and modes == other_modes


def test_what_a_failure_leaves_behind_is_the_same(checkpoint, tmp_path):
    checkpoint.model.train()
    modes, state = [module.training for module in checkpoint.model.modules()], torch.random.get_rng_state()
    with pytest.raises(UserError):
        sample(checkpoint, tmp_path, prompts=["hair " * 99])
    assert modes == [module.training for module in checkpoint.model.modules()]
    assert torch.equal(state, torch.random.get_rng_state()) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes, files", [
    ({"questions": []}, {"paintings.png", "samples.json"}), ({"faces": None}, {"paintings.png", "samples.json"}),
    ({"prompts": []}, {"faces.png", "samples.json"}), ({"write": False}, set()),
])  # fmt: skip
def test_what_is_not_asked_for_is_not_there(checkpoint, tmp_path, changes, files):
    assert sample(checkpoint, tmp_path, **changes)
    assert {each.name for each in tmp_path.iterdir()} == files


def test_without_an_image_tokenizer_there_are_words_alone(checkpoint, tmp_path):
    checkpoint.model.image_tokenizer = None
    assert sample(checkpoint, tmp_path) and [each.name for each in tmp_path.iterdir()] == ["samples.json"]
    assert len(json.loads((tmp_path / "samples.json").read_text())["answers"]) == 4


def test_a_disk_that_refuses_stops_nothing(checkpoint, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert not sample(checkpoint, tmp_path / "file" / "step-00000007")
    assert "cannot write" in capfd.readouterr().err


def test_samples_of_a_step_that_is_done_again_take_the_place(checkpoint, tmp_path):
    sample(checkpoint, tmp_path, prompts=PROMPTS[:1])
    sample(checkpoint, tmp_path)
    assert Image.open(tmp_path / "paintings.png").size == (2 * 64, 64)


def test_faces_are_taken_from_a_batch(checkpoint):
    config = tiny.CONFIG
    batch = tiny.single(tiny.mixed())
    plain = tiny.replaced(tiny.single(tiny.mmu((4,))), image_start=torch.tensor([-1]))
    batch = Batch.join([plain, batch], config.vocabulary.pad)
    faces = samples.faces_of(batch, config, 2)
    wanted = tiny.single(tiny.mmu((5, 2, 7)))
    first = config.vocabulary.code_range[0]
    assert torch.equal(faces.codes + first, wanted.input_ids[:2, 2 : 2 + config.image_tokens])
    assert torch.equal(faces.identity, wanted.identity[:2]) and torch.equal(faces.semantic, wanted.semantic[:2])
    assert len(samples.faces_of(batch, config, 99).codes) == 3


def test_texts_that_are_too_long_are_named_before_training(checkpoint):
    text, config = checkpoint.text_tokenizer, checkpoint.model.config
    samples.check(PROMPTS, QUESTIONS, text, config, "watch")
    with pytest.raises(UserError, match=r"watch\.prompts\[1\]: the prompt has \d+ tokens"):
        samples.check(["a person", "hair " * 99], [], text, config, "watch")
    with pytest.raises(UserError, match=r"watch\.questions\[0\]: it has \d+ tokens, at most 64"):
        samples.check([], ["hair " * 99], text, config, "watch")


def _rank(rank, folder, precision, failed):
    """One of two ranks of a sharded model: a training step, samples, the same step."""
    try:
        torch.set_num_threads(1)
        store = f"file://{folder}/store-{precision}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        checkpoint = Checkpoint.load(folder / "checkpoint")
        model = checkpoint.model.train()
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
        images = set(model.image_tokenizer.parameters())
        for module in (*model.blocks, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy, ignored_params=images)
        batch = tiny.single(tiny.mixed(rank, model.config))
        losses = []
        for _ in range(2):
            losses.append(model(**vars(batch)).loss)
            losses[-1].backward()
            model.zero_grad()
            sample(checkpoint, folder / str(precision), write=rank == 0)
        assert torch.equal(*losses)
        assert all(isinstance(each, DTensor) for each in model.blocks.parameters())
        dist.destroy_process_group()
        failed.put("")
    except BaseException:
        failed.put(traceback.format_exc())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_ranks_of_a_sharded_model_say_what_the_whole_one_says(checkpoint, tmp_path, precision):
    checkpoint.save(tmp_path / "checkpoint")
    start = multiprocessing.get_context("forkserver")  # imports once
    start.set_forkserver_preload(["test_samples"])
    failed = start.Queue()
    ranks = [start.Process(target=_rank, args=(rank, tmp_path, precision, failed)) for rank in range(2)]
    for each in ranks:
        each.start()
    assert [failed.get(timeout=100) for _ in ranks] == ["", ""]
    for each in ranks:
        each.join()
    for parameter in set(checkpoint.model.parameters()) - set(checkpoint.model.image_tokenizer.parameters()):
        parameter.data = parameter.to(precision)
    sample(checkpoint, tmp_path / "whole")
    for name in ("paintings.png", "faces.png", "samples.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / str(precision) / name).read_bytes(), name
