"""The report: a well-formed page whose pictures are there, what was typed shown as text; the summary's counts."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from unif2ace.data.attributes import ATTRIBUTES, NAMES
from unif2ace.errors import UserError
from unif2ace.evaluation import report
from unif2ace.evaluation.quality import Results

NASTY = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br"}


def results(p_generation=0.5, p_understanding=0.5, shown=13, painted=5) -> Results:
    def table(p, **row):
        return {name: {**row, "p": p[i] if isinstance(p, list) else p} for i, name in enumerate(NAMES)}

    def pictures(count):
        return np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)

    numbers = {
        "tokenizer": {"psnr_db": 23.456, "codes_used": 777, "label_kept": dict.fromkeys(NAMES, 0.875),
                      "face_found": 0.75, "face_found_before": 1.0},
        "generation": {"prompts": 96, "test": "binomial", "face_found": 0.25,
                       "attributes": table(p_generation, match=0.625, chance=1 / 3)},
        "understanding": {"faces": 300, "test": "McNemar",
                          "attributes": table(p_understanding, accuracy=0.8125, majority=0.4375)},
        "held_out_loss": {"mask": 1.0},
        "experts": {"token_t2i": [[0.5, 0.25, 0.25]] * 2, "token_mmu": [[0.5, 0.5, 0.0]] * 2,
                    "sequence_t2i": [[0.25] * 4] * 2, "sequence_mmu": [[0.5, 0.5, 0.0, 0.0]] * 2},
        "parameters": 3_210_000,
    }  # fmt: skip
    answers = [(0, NASTY, "dark", "dark"), (1, "how?", NASTY, "light"), (2, "how?", "a", NASTY)]
    return Results(
        numbers, pictures(shown), pictures(shown), pictures(shown), pictures(painted), [NASTY] * painted, answers
    )


LOGS = {
    "tokenizer": [{"step": step, "pixels": 1 / (step + 1), "edges": 0.5} for step in (0, 5, 10)],
    "model": [{"step": step, "mask": 5.0, "mmu": 1.0, "score": 9.0, "balance": 0.1} for step in (0, 5)],
}
SECONDS = {"install": 60.4, "faces": 90.3}


class Page(HTMLParser):
    """Checks that tags nest, and collects text and images."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag == "img":
            assert dict(attributes)["alt"]
            self.images.append(dict(attributes)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    report.write(folder, results(), LOGS, SECONDS)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def test_tags_nest_and_nothing_typed_becomes_one(page):
    assert page.open == [] and "script" not in page.seen and page.seen.count("table") >= 4
    assert page.text.count(NASTY) == 5 + 3, "the first prompts, and the three places of an answer's row"


def test_every_picture_of_the_page_is_there(page, folder):
    assert len(page.images) == 5
    for name in page.images:
        Image.open(folder / name).verify()
    assert {path.name for path in folder.iterdir()} == {"report.html", *page.images}


def test_pictures_have_a_place_for_every_face(folder):
    side = 64 * 2
    assert Image.open(folder / "painted.png").size == (12 * side, side)
    assert Image.open(folder / "reconstructed.png").size == (12 * side, 2 * side)


def test_numbers_are_on_the_page(page):
    for shown in ("23.5 dB", "777 codes", "96 prompts", "300 held-out faces", "3.2 M param", "0.62", "0.81", "25%"):
        assert shown in page.text, shown
    assert all(name in page.text for name in NAMES)
    assert "sum151" in page.text.replace("\n", "")


def test_only_wrong_answers_are_marked(folder):
    assert (folder / "report.html").read_text().count('class="wrong"') == 2


@pytest.mark.parametrize("count,columns", [(24, 12), (13, 12), (12, 12), (5, 5), (1, 1)])
def test_pairs_stand_one_above_the_other(count, columns):
    pairs = np.arange(2 * count, dtype=np.uint8).reshape(count, 2, 1, 1, 1) * np.ones((1, 1, 2, 2, 3), np.uint8)
    rows = report._row_pairs(pairs)[:, 0, 0, 0].reshape(-1, 2, columns)
    for above, below in rows:
        assert (below == above + 1).all() and (above % 2 == 0).all()
    assert rows[:, 0].flatten().tolist() == list(range(0, 2 * (count // columns * columns), 2))


def test_what_passed_is_counted_by_its_own_threshold():
    below, above = report.P_GENERATION * 0.9, report.P_GENERATION * 1.1
    generation = [below] * 4 + [above] * (len(ATTRIBUTES) - 4)
    below, above = report.P_UNDERSTANDING * 0.9, report.P_UNDERSTANDING * 1.1
    understanding = [below] * 2 + [above] * (len(ATTRIBUTES) - 2)
    case = results(generation, understanding)
    assert report.passed(case) == (4, 2)
    summary = report.summary(case, SECONDS, 12.3)
    lines = summary.splitlines()
    assert any(line.startswith("painted as prompted") and line.endswith(": 4 attributes") for line in lines)
    assert any(line.startswith("answered above") and line.endswith(": 2 attributes") for line in lines)
    assert "sum 151 s; this call 12 s" in summary and "25% of the paintings" in summary
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0] in NAMES]
    assert [row[0] for row in rows] == list(NAMES)
    assert rows[0][1:3] == ["0.62", "0.33"] and rows[0][4:6] == ["0.81", "0.44"]


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        report.write(tmp_path / "file", results(), LOGS, SECONDS)
