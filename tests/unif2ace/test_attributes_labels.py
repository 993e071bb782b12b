"""Label sets are what the data sets publish; label files are read as they are, or refused with the place in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unif2ace.attributes import categories as c
from unif2ace.attributes.labels import MISSING, LabelsConfig, read_labels
from unif2ace.errors import UserError


def read(path: Path, **options):
    return read_labels(LabelsConfig(str(path), **options))


def answers(labels, row: int = 0) -> dict[str, str]:
    return {
        name: values[labels.values[row, column]]
        for column, (name, values) in enumerate(labels.categories.items())
        if labels.values[row, column] != MISSING
    }


def test_the_label_sets_have_the_published_sizes() -> None:
    assert len(c.CELEBA) == 40
    assert [len(each) for each in (c.CELEBV_HQ_APPEARANCE, c.CELEBV_HQ_ACTION, c.CELEBV_HQ_EMOTION)] == [40, 35, 8]
    assert len(c.CELEBV_HQ) == 83


def test_every_label_is_a_value_of_a_category() -> None:
    for name, (category, value) in c.LABELS.items():
        assert name == c.plain(name) and value in c.CATEGORIES[category].values
    for each in c.CATEGORIES.values():
        assert each.kind in c.KINDS and len(each.values) > 1
        assert each.name == "attractive" or any(each.phrases.values())
    assert all(c.CATEGORIES[name].still for name in c.STILL) and {"smile", "emotion", "hat"} <= set(c.STILL)


def test_phrases_of_one_category_differ_from_value_to_value() -> None:
    for each in c.CATEGORIES.values():
        said = [phrase for value in each.values for phrase in each.phrases[value]]
        assert len(said) == len(set(said))


def test_phrases_of_unknown_categories_name_them() -> None:
    assert c.phrases("freckles", "yes") == ("freckles",) and c.phrases("freckles", "no") == ("no freckles",)
    assert c.phrases("clothes", "dark") == ("dark clothes",) and c.phrases("hair colour", "other") == ()


def test_contradictions_name_values_that_there_are() -> None:
    for pair in c.CONTRADICTIONS:
        assert len(pair) == 2
        for category, value in pair:
            assert value in c.CATEGORIES[category].values


@pytest.fixture
def celeba(tmp_path) -> Path:
    names = ["Wearing_Hat", "No_Beard", "Black_Hair", "Brown_Hair", "Smiling"]
    path = tmp_path / "list_attr_celeba.txt"
    rows = ["000001.jpg  1 -1  1 -1 1", "000002.jpg -1  1 -1 -1 -1", "000003.jpg -1  1  1  1 -1"]
    path.write_text("\n".join(["3", " ".join(names), *rows]) + "\n")
    return path


def test_celeba(celeba) -> None:
    labels = read(celeba)
    assert labels.names == ["000001.jpg", "000002.jpg", "000003.jpg"] == labels.groups
    assert answers(labels, 0) == {"hat": "yes", "beard": "yes", "hair colour": "black", "smile": "yes"}
    assert answers(labels, 1) == {"hat": "no", "beard": "no", "hair colour": "other", "smile": "no"}
    assert answers(labels, 2) == {"hat": "no", "beard": "no", "smile": "no"}
    assert labels.told == ["hair colour: 1 of 3 pictures have several at once: missing"]


def test_people_come_from_a_file_of_identities(celeba, tmp_path) -> None:
    who = tmp_path / "identity_CelebA.txt"
    who.write_text("000001.jpg 7\n000002.jpg 9\n000003.jpg 7\n")
    assert read(celeba, identities=str(who)).groups == ["7", "9", "7"]
    who.write_text("000001.jpg 7\n000003.jpg 7\n")
    with pytest.raises(UserError, match="does not say who is on 000002.jpg"):
        read(celeba, identities=str(who))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x\nSmiling\na 1\n", "'x' in the first line"),
        ("1\nSmiling Nonsense\na 1 1\n", "the label 'nonsense'"),
        ("1\nSmiling Male\na 1\n", "line 3: expected a name and 2 times"),
        ("1\nSmiling\na 0\n", "line 3: expected a name and 1 times 1 or -1"),
        ("2\nSmiling\na 1\n", "ends early: 1 pictures, its first line says 2"),
    ],
)
def test_a_wrong_celeba_file_is_refused(tmp_path, text, told) -> None:
    path = tmp_path / "list_attr_celeba.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        read(path)


def clip(appearance: list[int], action: list[int], emotion: object, who: str = "v") -> dict:
    several = isinstance(emotion, list)
    labels = [{"emotion": each, "start_sec": 0, "end_sec": 1} for each in emotion] if several else emotion
    found = {"appearance": appearance, "action": action, "emotion": {"sep_flag": several, "labels": labels}}
    return {"ytb_id": who, "attributes": found}


def celebv(path: Path, clips: dict, appearance: tuple = ("Blurry", "Blonde_hair", "gray_hair")) -> Path:
    meta = {"appearance_mapping": list(appearance), "action_mapping": ["smile", "talk"]}
    path.write_text(json.dumps({"meta_info": meta, "clips": clips}))
    return path


def test_celebv_hq(tmp_path) -> None:
    path = celebv(
        tmp_path / "celebvhq_info.json",
        {
            "a_0": clip([1, 0, 1], [0, 1], "happy"),
            "a_1": clip([0, 0, 0], [1, 0], ["neutral", "happy"]),
            "b_0": clip([0, 1, 0], [1, 0], ["sadness", "sadness"], "w"),
        },
    )
    labels = read(path, picture="{}.png")
    assert labels.names == ["a_0.png", "a_1.png", "b_0.png"] and labels.groups == ["v", "v", "w"]
    assert answers(labels, 0) == {
        "blurry": "yes", "hair colour": "gray", "smile": "no", "talk": "yes", "emotion": "happy",
    }  # fmt: skip
    assert "emotion" not in answers(labels, 1) and answers(labels, 2)["emotion"] == "sadness"
    assert answers(labels, 1)["hair colour"] == "other" and answers(labels, 2)["hair colour"] == "blond"
    assert labels.told == ["emotion: 1 of 3 clips show several one after another: missing"]


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"clips": {"a": clip([1, 0], [0, 1], "happy")}}, "clip a: appearance: expected 3 times 0 or 1"),
        ({"clips": {"a": clip([1, 0, 2], [0, 1], "happy")}}, "clip a: appearance: expected 3 times 0 or 1"),
        ({"clips": {"a": clip([1, 0, 0], [0, 1], "bored")}}, "emotion: expected one of neutral.*got 'bored'"),
        ({"clips": {"a": {"attributes": {}}}}, "clip a: expected ytb_id and attributes"),
        ({"clips": {}, "appearance": ("Horned",)}, "'horned', which CelebV-HQ does not have"),
        ({"clips": {}}, "has labels of no picture"),
        ({"clips": None}, "is no celebvhq_info.json"),
    ],
)
def test_a_wrong_celebv_hq_file_is_refused(tmp_path, made, told) -> None:
    with pytest.raises(UserError, match=told):
        read(celebv(tmp_path / "celebvhq_info.json", **made))


def test_csv_with_labels_categories_and_own_columns(tmp_path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image,Wearing_Hat,emotion,freckles,clothes\na.png,1,happy,0,dark\nb.png,,,true,bright\n")
    labels = read(path)
    assert labels.categories["clothes"] == ("bright", "dark") and labels.categories["freckles"] == ("yes", "no")
    assert answers(labels, 0) == {"hat": "yes", "emotion": "happy", "freckles": "no", "clothes": "dark"}
    assert answers(labels, 1) == {"freckles": "yes", "clothes": "bright"}
    some = read(path, categories=("clothes", "hat"))
    assert list(some.categories) == ["clothes", "hat"] and answers(some) == {"hat": "yes", "clothes": "dark"}


def test_no_known_colour_is_another_colour_only_where_all_are_known(tmp_path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("image,Black_Hair,Brown_Hair\na,0,0\nb,0,\nc,,1\n")
    labels = read(path)
    assert [answers(labels, row).get("hair colour") for row in range(3)] == ["other", None, "brown"]


def test_minus_one_means_what_is_said(tmp_path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"name": "a", "Male": -1, "who": 3}\n\n{"name": "b", "Male": 1, "who": 4}\n')
    assert answers(read(path, minus_one="no", identity="who")) == {"male": "no"}
    assert answers(read(path, minus_one="missing", identity="who")) == {}
    assert read(path, minus_one="no", identity="who").groups == ["3", "4"]
    with pytest.raises(UserError, match="labels.minus_one: .*Male has -1"):
        read(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "image,Male\na,1\na,0\n", "two records of a"),
        ("a.csv", "image,Male\na,1,0\n", "line 2: expected 2 columns"),
        ("a.csv", "image,Male\na\n", "line 2: expected 2 columns"),
        ("a.csv", "face,Male\na,1\n", "labels.name: say which column"),
        ("a.csv", "image,emotion\na,glum\n", "emotion: expected one of .*got 'glum'"),
        ("a.csv", "image\na\n", "no column of labels"),
        ("a.csv", "image,Male\n,1\n", "record 1 has no image"),
        ("a.csv", "image,Male\n", "labels of no picture"),
        ("a.csv", "image,t\n" + "".join(f"{n},text{n}\n" for n in range(25)), "25 different values"),
        ("a.jsonl", '{"name": "a"\n', "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.csv", "\xff\xfe\x00", "has labels of no picture|is no csv"),
        ("a.xyz", "", "cannot tell what"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, name, text, told) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=told):
        read(path)


def test_options_that_are_wrong_name_their_key(celeba, tmp_path) -> None:
    for options, told in (
        ({"kind": "xml"}, "labels.kind"),
        ({"minus_one": "yes"}, "labels.minus_one"),
        ({"picture": "x.png"}, "labels.picture"),
        ({"categories": ("tail",)}, "labels.categories: there is no 'tail'"),
    ):
        with pytest.raises(UserError, match=told):
            read(celeba, **options)
    with pytest.raises(UserError, match="labels.path"):
        read(tmp_path / "none.csv")


def test_the_demos_faces(tmp_path) -> None:
    classes = np.array([[0, 1, 1, 2, 0, 1, 1, 2, 0]], np.int8)
    np.savez(tmp_path / "faces.npz", classes=classes)
    found = answers(read(tmp_path / "faces.npz"))
    assert found["background"] == "dark" and found["tint"] == "neutral" and found["facing"] == "right"
    np.savez(tmp_path / "faces.npz", classes=classes[:, :3])
    with pytest.raises(UserError, match=r"classes: expected \[N, 9\]"):
        read(tmp_path / "faces.npz")
