"""The ablation study: every row of the paper's tables, runs that are paired and resumed, and what is said of them."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import tiny
import torch

from benchmarks import ablation as published
from benchmarks import results
from benchmarks.results import ROOT, devices, load, read_records
from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import SequenceMoEConfig, VocabularyConfig
from unif2ace.data.attributes import classify, fit_thresholds, measure
from unif2ace.data.dataset import FaceSet
from unif2ace.errors import UserError
from unif2ace.evaluation import ablation, study, tables
from unif2ace.evaluation.ablation import Material, Study
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.painting import PaintSettings
from unif2ace.training.recipe import EncodedFaces, RecipeConfig

SHORT = Study(steps=3, recipe=RecipeConfig(t2i=3, mmu=3, captions=1), faces=3, prompts=3, paint=PaintSettings(steps=2))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a demo run in little: faces of noise, an untrained tokenizer."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    text = tiny.text_tokenizer()
    tokenizer = ImageTokenizer(ImageTokenizerConfig(bits=4, fine=8, coarse=8, blocks=1)).eval()
    config = tiny.config(
        vocabulary=VocabularyConfig(text.size, 16), image_tokens=64, text_slots=48, identity=6, semantic=4,
        semantic_source="image_tokenizer",
    )  # fmt: skip
    images = rng.integers(0, 256, (18, 64, 64, 3), dtype=np.uint8)
    thresholds = fit_thresholds(measure(images[:6]))
    identity = rng.normal(size=(18, 6)).astype(np.float32)
    faces = FaceSet(images, classify(measure(images), thresholds), thresholds, identity, 6, {"held_out": 6})
    folder = tmp_path_factory.mktemp("demo")
    faces.save(folder / "faces.npz")
    Checkpoint.of(UniF2aceForConditionalGeneration(config).eval(), tokenizer, text).save(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def material(demo):
    return Material.load(demo)


def test_the_faces_of_training_and_of_measuring_are_apart(material):
    assert (len(material.train.codes), len(material.test.codes)) == (12, 6)
    whole = EncodedFaces.of(material.faces, material.checkpoint.image_tokenizer)
    assert torch.equal(material.test.codes, whole.at(material.faces.test).codes)


def test_every_variant_is_the_row_that_it_is_called(material):
    found = ablation.variants(material.checkpoint.model.config)
    assert len(found) == 12 and len({each.name for each in found}) == 12
    base = material.checkpoint.model.config
    for each in found:
        config = json.loads(json.dumps(base.replace(**each.changes).to_dict()))
        assert tables.variant(config) == (each.table, each.name)
    by_name = {each.name: base.replace(**each.changes) for each in found}
    assert by_name["full"].loss.alpha == 0.01 and by_name["full"].sequence_moe == SequenceMoEConfig()
    assert by_name["score only"].loss.mask == 0 and by_name["score only"].loss.alpha == 0.01
    assert by_name["no experts"].token_moe is None and by_name["no experts"].sequence_moe is None
    with pytest.raises(UserError, match="both levels of experts"):
        ablation.variants(base.replace(token_moe=None))


def test_active_sizes_are_alike_with_and_without_token_experts(material):
    """A dense FFN stands in for what a token uses: parameters used differ by the routers and the biases alone."""
    found = {each.name: each for each in ablation.variants(material.checkpoint.model.config)}
    base = material.checkpoint.model.config
    used = {}
    for name in ("full", "sequence level only"):
        parts = ablation.parameters(base.replace(**found[name].changes))
        used[name] = sum(p.used[0] for p in parts if p.name in ("FFN", "routed experts", "shared experts"))
    assert abs(used["full"] - used["sequence level only"]) < 0.05 * used["full"]


def test_a_run_is_trained_once_and_comes_out_the_same(material, tmp_path, monkeypatch):
    variant = ablation.variants(material.checkpoint.model.config)[0]
    first = ablation.run(material, variant, 0, SHORT, tmp_path / "a")
    again = ablation.run(material, variant, 0, SHORT, tmp_path / "b")
    assert first["measures"] == again["measures"] and first["fingerprint"] == again["fingerprint"]
    assert ablation.run(material, variant, 1, SHORT, tmp_path / "a")["measures"] != first["measures"]
    assert not list((tmp_path / "a").glob("*.pt"))
    monkeypatch.setattr(ablation, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert ablation.run(material, variant, 0, SHORT, tmp_path / "a") == json.loads(json.dumps(first))
    longer = dataclasses.replace(SHORT, steps=4)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        ablation.run(material, variant, 0, longer, tmp_path / "a")
    measures = first["measures"]
    assert set(study.MEASURES) <= set(measures) and all(math.isfinite(measures[name]) for name in study.MEASURES)
    assert measures["answered"] == pytest.approx(np.mean(list(measures["answered_by_attribute"].values())))
    assert np.shape(measures["codes"]) == (3, 64)


def test_runs_of_a_seed_see_the_same_rows(material, monkeypatch, tmp_path):
    """Whatever the variant: pairs of runs differ in the model alone."""
    seen = {}

    def fit(model, optimizers, loss, schedule, state, *, name, fingerprint):
        state.parent.mkdir(exist_ok=True)
        state.touch()
        recipe = loss.func.__self__
        seen[name] = [recipe.batch(step) for step in range(2)]
        return [{"seconds": 0.0, "mask": 1.0, "score": 1.0, "mmu": 1.0}]

    monkeypatch.setattr(ablation, "fit", fit)
    monkeypatch.setattr(ablation, "measure", lambda *_: {})
    found = {each.name: each for each in ablation.variants(material.checkpoint.model.config)}
    for name, seed in (("full", 0), ("no experts", 0), ("score only", 0), ("full", 1)):
        ablation.run(material, found[name], seed, SHORT, tmp_path)
    same = [all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(seen["full-0"], other)) for other in
            (seen["no-experts-0"], seen["score-only-0"], seen["full-1"])]  # fmt: skip
    assert same == [True, True, False]


def test_measures_are_of_the_model_that_is_given(material):
    """One that names the right code for every place of the held-out faces has a lower loss than one that does not."""
    torch.manual_seed(0)
    model = UniF2aceForConditionalGeneration(material.checkpoint.model.config.replace(image_tokenizer=None)).eval()
    before = ablation.measure(material, model, SHORT)
    first, stop = model.config.vocabulary.code_range
    with torch.no_grad():
        model.head.bias[first:stop] = torch.log1p(torch.bincount(material.test.codes.flatten(), minlength=16).float())
    after = ablation.measure(material, model, SHORT)
    assert after["masked_loss"] < before["masked_loss"] and after["score_bound"] < before["score_bound"]
    assert after["answer_loss"] > before["answer_loss"]  # codes that are likelier leave less for words


# What is said of a study


def run(variant, seed, value, table="loss", **more):
    measures = {name: value if study.MEASURES[name][0] else -value for name in study.MEASURES}
    sizes = {"parameters": 9, "active_t2i": 5, "active_mmu": 5, "step_flops": 2e9}
    return {"variant": variant, "table": "all" if variant == "full" else table, "seed": seed, "study": {"steps": 1},
            "size": sizes, "measures": measures, **more}  # fmt: skip


def test_a_variant_is_held_against_the_full_model_seed_by_seed():
    """The seeds are far apart and the variants are close: paired, it shows.

    Differences 1, 1.1, 1.2; -1, 0, 1; -2, -2, -2; 5, 5: pooled, their variance is (0.02 + 2) / 7, degrees of freedom 7,
    and Student's t at 99.5 % is 3.4995.
    """
    runs = [run("full", seed, 10.0 * seed) for seed in range(3)]
    runs += [run("good", seed, 10.0 * seed + 1 + 0.1 * seed) for seed in range(3)]
    runs += [run("mixed", seed, 10.0 * seed + (seed - 1)) for seed in range(3)]
    runs += [run("bad", seed, 10.0 * seed - 2, "experts") for seed in range(3)]
    runs += [run("few", seed, 10.0 * seed + 5, "features") for seed in range(2)]
    full, good, mixed, bad, few = study.summaries(runs)
    assert full.name == "full" and full.cells["answered"].difference is None
    assert full.cells["answered"].mean == 10 and full.cells["answered"].spread == pytest.approx(10)
    for name in study.MEASURES:
        higher = study.MEASURES[name][0]
        cell = good.cells[name]
        assert cell.verdict == "better" and cell.wins == 3
        assert cell.noise == pytest.approx(3.4995 * math.sqrt(2.02 / 7 / 3), rel=1e-4)
        assert cell.difference.value == pytest.approx(1.1 if higher else -1.1)
        assert mixed.cells[name].verdict == "" and bad.cells[name].verdict == "worse"
        assert few.cells[name].verdict == "better" and few.cells[name].wins == 2
    words = study.in_words([full, good, mixed, bad, few]).splitlines()
    assert words[0].startswith("- good: better in masked loss (-1.100), score term (-1.1)") and words[1].endswith(
        "no difference beyond the noise"
    )
    page = study.page([full, good, mixed, bad, few], "about")
    assert (
        "| good | 3 |" in page
        and "**+1.100 [+1.000, +1.200], 3/3**" in page
        and "| bad | 9 | 5 | 5 | 2.00 | 1.000 |" in page
    )


def test_runs_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="all of one study"):
        study.summaries([run("full", 0, 1.0), run("full", 1, 1.0, study={"steps": 2})])
    with pytest.raises(ValueError, match="some of the variant 'full'"):
        study.summaries([run("good", 0, 1.0)])


def test_the_command(demo, tmp_path, capsys, monkeypatch):
    from unif2ace.cli import main

    def one(material, variant, seed, study, work):
        return run(variant.name, seed, float(seed), variant.table)

    monkeypatch.setattr(ablation, "run", one)
    assert main(["ablate", str(demo), "--out", str(tmp_path), "--seeds", "2"]) == 0
    assert "score only: no difference" in capsys.readouterr().out
    assert "# Ablations" in (tmp_path / "ablations.md").read_text()
    assert main(["ablate", str(demo), "--out", str(tmp_path), "--seeds", "0"]) == 1
    assert "--seeds, --steps: expected at least 1" in capsys.readouterr().err


def test_the_questions_are_answered_plainly():
    runs = [run("full", seed, 10.0 * seed) for seed in range(3)]
    runs += [run("mask only (alpha 0)", seed, 10.0 * seed - 1) for seed in range(3)]
    runs += [run("no experts", seed, 10.0 * seed + 0.01 * (seed - 1), "experts") for seed in range(3)]
    first, second, third = study.answers(study.summaries(runs)).split("\n\n")
    assert "Without it, mask only (alpha 0): worse in masked loss (+1.000)" in first
    assert second.endswith("Without them, no experts: no difference beyond the noise.")
    assert third.startswith("Differences smaller than these would not have shown: masked loss 0.0")


def test_one_seed_shows_nothing():
    full, other = study.summaries([run("full", 0, 1.0), run("other", 0, 9.0)])
    assert all(cell.verdict == "" and cell.noise is None for cell in other.cells.values())


# The committed study


def test_the_page_says_what_the_committed_runs_say():
    assert published.main(["--check"]) == 0
    runs = read_records(ROOT / published.RECORDS)
    assert {each["variant"] for each in runs} == {each.name for each in ablation.variants(tiny.config())}
    assert all(each["op"] == "ablation" and each["commit"] and "codes" not in each["measures"] for each in runs)
    assert not re.search(r"(?<![\w.])/(tmp|root|work|home)", (ROOT / published.RECORDS).read_text())


def test_a_study_is_no_device_of_the_benchmarks():
    assert load((ROOT / published.RECORDS).parent).results == []
    assert "ablation" not in {each.name for each in devices()}


def test_a_stale_page_is_seen(tmp_path, monkeypatch):
    for path in (published.RECORDS, published.PAGE):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert published.main(["--check"]) == 0
    lines = (tmp_path / published.RECORDS).read_text().splitlines()
    changed = json.loads(lines[0])
    changed["measures"]["answered"] += 0.1
    (tmp_path / published.RECORDS).write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    assert published.main(["--check"]) == 1
