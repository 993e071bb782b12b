"""The page on a built set and on heads says what the committed records say."""

import re

import pytest

from benchmarks import faces, results
from benchmarks.results import ROOT, load, read_records


def test_the_committed_page_is_the_records():
    assert faces.main(["--check"]) == 0
    lines = read_records(ROOT / faces.RECORDS)
    assert [each["op"] for each in lines] == ["dataset", "attributes", "attributes"]
    assert not re.search(r"(?<![\w.])/(tmp|root|work|home)", (ROOT / faces.RECORDS).read_text())
    built, head = lines[:2]
    assert built["statistics"]["faces"] >= built["stages"][-1][-1] >= 200  # some have a caption and no question
    text = faces.page(lines)
    assert f"{built['pairs']} questions with answers" in text
    for name, each in head["categories"].items():
        assert f"| {name} | {each['majority']:.3f} | {each['accuracy']:.3f} |" in text
    assert load((ROOT / faces.RECORDS).parent).results == []


@pytest.mark.parametrize("change", ["page", "records"])
def test_a_stale_page_is_seen(tmp_path, monkeypatch, change):
    for path in (faces.RECORDS, faces.PAGE):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert faces.main(["--check"]) == 0
    path = tmp_path / (faces.PAGE if change == "page" else faces.RECORDS)
    path.write_text(re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), path.read_text(), count=40))
    assert faces.main(["--check"]) == 1
    assert faces.main([]) == 0 and faces.main(["--check"]) == 0
