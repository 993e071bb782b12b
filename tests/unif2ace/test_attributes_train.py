"""A head learns, is calibrated, keeps people apart, is silent in doubt; the command's files, errors and determinism."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from unif2ace.attributes import fit, head, measures, report, train
from unif2ace.attributes.features import Features
from unif2ace.attributes.labels import MISSING, LabelsConfig
from unif2ace.attributes.sources import open_source
from unif2ace.attributes.train import TrainConfig, train_attributes
from unif2ace.cli import main
from unif2ace.encoders import FaceCountError
from unif2ace.errors import UserError

NONE = -1


def test_average_precision_of_hand_counted_orders() -> None:
    score = np.array([0.9, 0.8, 0.7, 0.6])
    for positive, expected in (
        ([1, 1, 0, 0], 1.0),
        ([0, 1, 0, 1], (1 / 2 + 2 / 4) / 2),
        ([0, 0, 0, 1], 1 / 4),
    ):
        assert measures.average_precision(score, np.array(positive, bool)) == pytest.approx(expected)
    # equal scores come in together, whatever their order
    for positive in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert measures.average_precision(np.full(4, 0.5), np.array(positive, bool)) == pytest.approx(1 / 4)


def test_scores_of_a_hand_counted_case() -> None:
    probabilities = np.array([[0.95, 0.05], [0.65, 0.35], [0.65, 0.35], [0.25, 0.75]])
    found = measures.scores(probabilities, np.array([0, 0, 1, 1]), confidence=0.7)
    assert found["counts"] == [2, 2] and found["accuracy"] == 0.75 and found["majority"] == 0.5
    assert found["balanced"] == 0.75 and found["chance"] == 0.5
    assert found["balanced_error"] == pytest.approx(np.sqrt(0.25 / 2) / 2)
    assert found["answered"] == 0.5 and found["accuracy_answered"] == 1.0
    assert found["calibration_error"] == pytest.approx((0.05 + 2 * 0.15 + 0.25) / 4)
    assert [each["faces"] for each in found["bins"]] == [2, 1, 1]
    assert found["interval"][0] < 0.75 < found["interval"][1]
    assert measures.scores(probabilities, np.array([0, 0, 0, 1]), 0.7)["majority"] == 0.75
    nothing = measures.scores(np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([0, 1]), confidence=0.9)
    assert nothing["answered"] == 0 and nothing["accuracy_answered"] is None


def test_measures_count_values_that_occur_alone() -> None:
    found = measures.scores(np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), np.array([0, 1]), 0.5)
    assert found["chance"] == 0.5 and found["balanced"] == 1.0 and found["average_precision"] == 1.0


def test_people_are_never_on_two_sides_and_keep_theirs() -> None:
    groups = [f"person {number // 3}" for number in range(3000)]
    parts = fit.split(groups, 0.2, 0.1)
    assert all(len(set(parts[start : start + 3])) == 1 for start in range(0, 3000, 3))
    shares = np.bincount(parts) / 3000
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.05)
    np.testing.assert_array_equal(fit.split(groups[::-1][:50], 0.2, 0.1), parts[::-1][:50])


def test_class_weights_have_mean_one_and_a_limit() -> None:
    values = np.array([[0, 0], [0, 1], [0, NONE], [1, NONE]])
    first, second = fit.class_weights(values, [2, 3], 10.0)
    np.testing.assert_allclose(first, [4 / 3 / 2, 4 / 1 / 2])
    assert first[values[:, 0]].mean() == 1
    np.testing.assert_allclose(second, [1, 1, 0])
    assert fit.class_weights(values, [2, 3], 1.5)[0][1] == 1.5
    np.testing.assert_allclose(fit.class_weights(values, [2, 3], 1.0)[0], [2 / 3, 1])


def test_the_loss_passes_missing_answers_over() -> None:
    logits = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0], [9.0, 9.0, 9.0]]))
    weights = [torch.ones(2), torch.ones(3)]
    got = fit.loss(logits, torch.tensor([[0, 0], [1, MISSING]]), weights)
    first = (torch.log1p(torch.exp(torch.tensor(-2.0))) + torch.log1p(torch.exp(torch.tensor(-1.0)))) / 2
    second = torch.log(torch.exp(torch.tensor(1.0)) + 2) - 1
    assert got.item() == pytest.approx(((first + second) / 2).item(), rel=1e-6)
    assert fit.loss(logits, torch.full((2, 2), MISSING), weights).item() == 0


def toy(count: int = 1500, share: float = 0.5, noise: float = 1.0, seed: int = 0):
    """Features whose first number tells a yes or no, the second one of three classes, the rest nothing."""
    rng = np.random.default_rng(seed)
    binary = (rng.random(count) < share).astype(np.int64)
    three = rng.integers(0, 3, count)
    x = rng.standard_normal((count, 8)) * noise
    x[:, 0] += 3.0 * binary
    x[:, 1] += 3.0 * three
    return torch.from_numpy(x).float() * 5 + 100, np.stack([binary, three], 1).astype(np.int8)


CATEGORIES = {"hat": ("yes", "no"), "size": ("small", "medium", "large")}


def fitted(share: float = 0.5, **options):
    x, values = toy(share=share)
    parts = fit.split([str(row) for row in range(len(x))], 0.2, 0.2)
    torch.manual_seed(0)
    made = head.AttributeHead(x.shape[1], CATEGORIES)
    losses = fit.fit(made, x, values, parts, fit.FitConfig(rate=5e-2, epochs=100, patience=5, **options))
    tested = parts == fit.TEST
    return made, x[tested], values[tested], losses


def test_a_head_learns_and_stops() -> None:
    made, x, values, losses = fitted()
    probabilities = made.probabilities(x)
    assert [tuple(each.shape) for each in probabilities] == [(len(x), 2), (len(x), 3)]
    for each, answers, least in zip(probabilities, values.T, (0.88, 0.85)):
        np.testing.assert_allclose(each.sum(1), 1, atol=1e-5)
        assert (each.argmax(1).numpy() == answers).mean() > least
    validation = [each for _, each in losses]
    assert len(losses) < 100 and np.argmin(validation) == len(losses) - 6  # patience of 5 after the best


def test_the_best_epoch_is_kept() -> None:
    x, values = toy(90, noise=2.0)  # few and noisy, so that it soon learns them by heart
    parts = fit.split([str(row) for row in range(len(x))], 0.4, 0.2)
    torch.manual_seed(0)
    made = head.AttributeHead(x.shape[1], CATEGORIES, hidden=64)
    losses = fit.fit(made, x, values, parts, fit.FitConfig(rate=1e-2, decay=0, epochs=60, patience=8, balance=5.0))
    best = min(each for _, each in losses)
    assert losses[-1][1] > 1.01 * best
    torch.testing.assert_close(made.mean, x[parts == fit.TRAIN].mean(0))  # the rest is not looked at
    held, weights = parts == fit.VALIDATION, fit.class_weights(values[parts == fit.TRAIN], made.sizes, 5.0)
    with torch.no_grad():
        kept = fit.loss(made(x[held]), torch.from_numpy(values[held]).long(), weights)
    assert kept.item() == pytest.approx(best, rel=1e-5)


def test_a_head_is_calibrated_though_its_classes_were_weighed() -> None:
    made, x, values, _ = fitted(share=0.08, balance=20.0)
    calibrated = made.probabilities(x)[0].numpy()
    with torch.no_grad():
        plain = made(x)[0].softmax(1).numpy()
    answers = values[:, 0].astype(int)
    truth = answers.mean()
    assert plain[:, 1].mean() > 1.4 * truth  # weighing classes makes the rare one look common
    assert calibrated[:, 1].mean() == pytest.approx(truth, abs=0.03)
    errors = [measures.scores(each, answers, 0.5)["calibration_error"] for each in (plain, calibrated)]
    assert errors[1] < 0.6 * errors[0]


def test_calibration_finds_a_known_temperature() -> None:
    torch.manual_seed(0)
    made = head.AttributeHead(3, {"size": ("a", "b", "c")})
    with torch.no_grad():
        made.layers[-1].weight.copy_(torch.eye(3))
        made.layers[-1].bias.zero_()
    x = torch.randn(4000, 3) * 4
    answers = torch.distributions.Categorical(logits=x * 0.5 + torch.tensor([0.7, -0.7, 0.0])).sample()
    fit.calibrate(made, x, answers[:, None])
    assert made.sharpness.exp().item() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(made.bias - made.bias.mean(), [0.7, -0.7, 0.0], atol=0.2)


def described(**more) -> head.Description:
    return head.Description(
        **{"features": "sface", "fingerprint": "f", "framed": False, "confidence": 0.8, "told": ("hat",), **more}
    )


def test_a_saved_head_is_the_same(tmp_path) -> None:
    made, x, _, _ = fitted()
    head.save(made, described(), tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {head.CONFIG, head.WEIGHTS}
    again, description = head.load(tmp_path)
    assert description == described() and again.categories == CATEGORIES
    for one, other in zip(made.probabilities(x), again.probabilities(x)):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (head.CONFIG, lambda path: path.unlink(), "is missing"),
        (head.CONFIG, lambda path: path.write_text("{"), "is damaged"),
        (head.CONFIG, lambda path: path.write_text("[]"), "does not describe an attribute head"),
        (head.CONFIG, lambda path: path.write_text('{"format": 99}'), "of another version"),
        (head.CONFIG, lambda path: path.write_text(path.read_text().replace('"width": 8', '"width": 9')), "of another"),
        (head.CONFIG, lambda path: path.write_text(path.read_text().replace("framed", "famed")), "does not describe"),
        (head.WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
        (head.WEIGHTS, lambda path: path.unlink(), "missing"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path, name, change, told) -> None:
    head.save(head.AttributeHead(8, CATEGORIES), described(), tmp_path)
    change(tmp_path / name)
    with pytest.raises(UserError, match=told):
        head.load(tmp_path)


def pictures(folder: Path, count: int = 240) -> Path:
    """Pictures that are bright or dark, and warm or cool, as a CSV says of them; two of each person."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = ["image,who,bright,tint"]
    for number in range(count):
        bright, warm = rng.integers(0, 2, 2)
        image = rng.normal(150 if bright else 90, 12, (64, 64, 3)) + np.array([25, 0, -25]) * (1 if warm else -1)
        cv2.imwrite(str(folder / f"{number}.png"), image.clip(0, 255).astype(np.uint8)[..., ::-1])
        lines.append(f"{number}.png,{number // 2},{bright if number % 7 else ''},{'warm' if warm else 'cool'}")
    (folder.parent / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(folder: Path, checkpoint: Path, out: str = "head") -> TrainConfig:
    return TrainConfig(
        labels=LabelsConfig(str(folder.parent / "labels.csv"), identity="who"),
        images=str(folder),
        out=str(folder.parent / out),
        features=f"tokens:{checkpoint}",
        fit=fit.FitConfig(epochs=30, rate=1e-2),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, untrained) -> tuple[TrainConfig, dict]:
    config = settings(pictures(tmp_path_factory.mktemp("faces") / "pictures"), untrained)
    return config, train_attributes(config, say=lambda line: None)


def test_from_pictures_to_a_tested_head(trained) -> None:
    config, found = trained
    assert sum(found["faces"].values()) == 240 and sum(found["people"].values()) == 120
    for name, values in (("bright", ["yes", "no"]), ("tint", ["cool", "warm"])):
        each = found["categories"][name]
        assert each["values"] == values and each["told"] and each["accuracy"] > 0.95 > each["majority"] + 0.2
    assert json.loads((Path(config.out) / "report.json").read_text()) == json.loads(json.dumps(found))


def test_the_trained_head_is_a_source(trained) -> None:
    config, _ = trained
    source = head.AttributeClassifier(config.out)
    assert source.categories == {"bright": ("yes", "no"), "tint": ("cool", "warm")} and "head" in source.name
    bright_warm = np.full((80, 80, 3), (175, 150, 125), np.uint8)
    dark_cool = np.full((64, 64, 3), (65, 90, 115), np.uint8)
    for answers, expected in zip(source([bright_warm, dark_cool]), (("yes", "warm"), ("no", "cool"))):
        assert tuple(each.value for each in answers) == expected
        assert all(config.confidence <= each.probability <= 1 for each in answers)
    assert head.AttributeClassifier(config.out, confidence=1.1)([dark_cool]) == [[]]
    assert source([]) == []


def test_what_a_test_did_not_show_is_never_said(trained, tmp_path) -> None:
    config, _ = trained
    made, description = head.load(Path(config.out))
    head.save(made, head.Description(**{**vars(description), "told": ("tint",)}), tmp_path)
    source = head.AttributeClassifier(tmp_path)
    assert set(source.categories) == {"tint"}
    assert [each.category for each in source([np.full((64, 64, 3), (65, 90, 115), np.uint8)])[0]] == ["tint"]


def test_no_better_than_chance_is_not_told() -> None:
    x, values = toy(200)
    made = head.AttributeHead(x.shape[1], CATEGORIES)
    with torch.no_grad():
        made.layers[-1].weight.zero_()
        made.layers[-1].weight[:2, 0] = torch.tensor([-1.0, 1.0])  # knows the first category, nothing of the second
        made.layers[-1].bias.copy_(torch.tensor([107.5, -107.5, 0.1, 0.0, 0.0]))
    found = train._test(made, x, values, 0.5)
    assert found["hat"]["told"] and found["hat"]["accuracy"] > 0.9 and not found["size"]["told"]


def test_no_picture_is_read_outside_its_folder(tmp_path) -> None:
    pictures(tmp_path / "pictures", 2)
    assert isinstance(train._read(tmp_path / "pictures", "1.png"), np.ndarray)
    (tmp_path / "1.png").write_bytes((tmp_path / "pictures" / "1.png").read_bytes())
    assert "lies outside" in train._read(tmp_path / "pictures", "../1.png")


def test_features_of_other_weights_are_refused(trained, tmp_path) -> None:
    config, _ = trained
    made, description = head.load(Path(config.out))
    head.save(made, head.Description(**{**vars(description), "fingerprint": "another"}), tmp_path)
    with pytest.raises(UserError, match="trained on other features"):
        head.AttributeClassifier(tmp_path)


def test_features_may_have_moved(trained, untrained, tmp_path) -> None:
    config, _ = trained
    made, description = head.load(Path(config.out))
    head.save(made, head.Description(**{**vars(description), "features": f"tokens:{tmp_path / 'gone'}"}), tmp_path)
    with pytest.raises(UserError, match="gone"):
        head.AttributeClassifier(tmp_path)
    dark = [np.full((64, 64, 3), (65, 90, 115), np.uint8)]
    moved = head.AttributeClassifier(tmp_path, features=f"tokens:{untrained}")
    assert moved(dark) == head.AttributeClassifier(config.out)(dark) != [[]]


def test_one_seed_gives_one_head(trained, untrained) -> None:
    config, found = trained
    again = train_attributes(settings(Path(config.images), untrained, "again"), say=lambda line: None)
    assert again["categories"] == found["categories"] and again["losses"] == found["losses"]
    first, second = ((Path(each["config"]["out"]) / head.WEIGHTS).read_bytes() for each in (found, again))
    assert first == second


def test_the_page_shows_every_category(trained, tmp_path) -> None:
    _, found = trained
    found = {**found, "noticed": ["<b>: left out"]}
    report.write(tmp_path, found)
    text = (tmp_path / report.PAGE).read_text()
    assert "120 people, nobody on two sides" in text
    assert all(name in text for name in found["categories"]) and "&lt;b&gt;: left out" in text
    assert (tmp_path / report.PICTURE).stat().st_size > 1000 and (tmp_path / report.LOSSES).exists()
    lines = report.lines(found)
    assert len(lines) == 3 and lines[1].startswith("bright") and "never answered" not in lines[-1]
    found["categories"] = {"dull": {**found["categories"]["tint"], "told": False}}
    assert "never answered" in report.lines(found)[-1]


def test_the_command(trained, untrained, tmp_path, capsys) -> None:
    config, _ = trained
    given = tmp_path / "config.yaml"
    given.write_text(f"labels: {{path: {config.labels.path}, identity: who}}\nfit: {{epochs: 2}}\n")
    options = [f"--images={config.images}", f"--out={tmp_path / 'head'}", f"--features=tokens:{untrained}"]
    assert main(["train-attributes", str(given), *options, "--fewest=5"]) == 0
    shown = capsys.readouterr().out
    assert "balanced" in shown and "tint" in shown
    assert {"attributes.json", "attributes.safetensors", "report.json", "report.html"} <= {
        each.name for each in (tmp_path / "head").iterdir()
    }
    assert main(["train-attributes", str(given), *options, "--fit.rate=0"]) == 1
    assert "fit.rate: expected a rate above 0" in capsys.readouterr().err


def test_what_is_wrong_is_told_with_its_key(trained, tmp_path) -> None:
    config, _ = trained

    def told(expected: str, **changes) -> None:
        values = {**vars(config), "out": str(tmp_path / "out"), **changes}
        with pytest.raises(UserError, match=expected):
            train_attributes(TrainConfig(**values), say=lambda line: None)

    told("images: name the folder", images=None)
    told("images: .* is not a folder", images=str(tmp_path / "none"))
    told("features: expected one of", features="eyes")
    told("confidence: expected", confidence=1.0)
    told("240 pictures cannot be read, max_corrupt is 100; first: cannot read", images=str(tmp_path))
    told("no category has 200 faces", fewest=200)
    assert not (tmp_path / "out").exists()


def test_unreadable_pictures_are_passed_over_and_counted(trained, untrained, tmp_path) -> None:
    config, _ = trained
    for number in range(240):
        (tmp_path / f"{number}.png").write_bytes((Path(config.images) / f"{number}.png").read_bytes())
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    values = {**vars(config), "images": str(tmp_path), "out": str(tmp_path / "out")}
    noticed: list[str] = []
    found = train_attributes(TrainConfig(**values), say=noticed.append)
    assert found["passed_over"] == {"cannot be read": 2, "no face found": 0}
    assert sum(found["faces"].values()) == 238 and "cannot be read: 2 pictures passed over" in noticed


def test_pictures_without_a_face_are_left_out(monkeypatch) -> None:
    class Finder:
        fingerprint = "f"

        def __call__(self, images):
            for index, image in enumerate(images):
                if not image.any():
                    raise FaceCountError(index, 0)
            return torch.tensor([[float(image.mean()), 1.0] for image in images])

    monkeypatch.setattr("unif2ace.attributes.features.encoder", lambda kind, device, **options: Finder())
    images = [np.full((4, 4, 3), value, np.uint8) for value in (0, 5, 0, 0, 9, 0)]
    vectors, kept = Features("sface")(images)
    assert kept == [1, 4] and vectors.tolist() == [[5, 1], [9, 1]]
    assert Features("sface")(images[:1])[1] == []
    assert Features("sface")(images * 4)[1] == [1, 4, 7, 10, 13, 16, 19, 22]  # over the size of a batch


def test_sources_by_name(trained) -> None:
    config, _ = trained
    source = open_source(f"classifier:{config.out}")
    assert source.categories == {"bright": ("yes", "no"), "tint": ("cool", "warm")}
    surer = head.AttributeClassifier(config.out, confidence=0.99)
    assert source.fingerprint == head.AttributeClassifier(config.out).fingerprint != surer.fingerprint
    for name in ("eyes", "classifier", "classifier:", "measured"):
        with pytest.raises(UserError, match="expected classifier:FOLDER, face-parser:FILE or measured:FACES.npz"):
            open_source(name)
    with pytest.raises(UserError, match="no face parser in"):
        open_source(f"face-parser:{config.out}")
