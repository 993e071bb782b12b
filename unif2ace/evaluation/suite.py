"""`unif2ace evaluate`: every row of a suite for one model, each with a value or with the reason why it has none.

What takes long (paintings, answers, scores) is kept a line each in the results' folder, so that an evaluation goes on
where it was stopped. A row that fails leaves the others alone. Pictures leave this machine for the endpoints that the
config names, and identity embeddings for nowhere: they are compared and let go.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from unif2ace import checksums
from unif2ace.attributes.sources import open_source
from unif2ace.checkpoint import Checkpoint
from unif2ace.data.config import SetConfig
from unif2ace.errors import UserError
from unif2ace.evaluation import distances
from unif2ace.evaluation.config import SuiteConfig
from unif2ace.evaluation.faces import Face, Faces, kind_of, open_faces
from unif2ace.evaluation.inception import Inception
from unif2ace.evaluation.intervals import mean
from unif2ace.evaluation.rows import MEASURES, SUITES, Absent, Row, tally
from unif2ace.evaluation.vqa import exact, soft
from unif2ace.evaluation.work import Work
from unif2ace.files import read_json, replacing, write_json
from unif2ace.parsing import reading

if TYPE_CHECKING:
    from unif2ace.evaluation.asker import Asker

FACES = {"quick": 100, "paper": 1000}
SHOWN = 24


def checkpoint_of(run: Path) -> Path:
    """The checkpoint of a run's folder, or the folder itself where it is one."""
    return run / "checkpoint" if (run / "checkpoint").is_dir() else run


def _by_attribute(categories: list[str], right: list[float]) -> dict[str, dict[str, tuple[float, int]]]:
    return {"kind": tally([kind_of(each) for each in categories], right), "attribute": tally(categories, right)}


def name_of(run: Path) -> str:
    folder = run.resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


def evaluate(run: Path, suite: str, config: SuiteConfig, out: Path) -> dict[str, Any]:
    """Measure one run and write `out`/result.json, which is returned.

    Raises:
        UserError: the run or the data cannot be read, or `out` holds results of other settings.
    """
    if suite not in SUITES:
        raise UserError(f"--suite: expected one of {', '.join(SUITES)}, got {suite!r}")
    ready(config.check())
    folder = checkpoint_of(run)
    checkpoint = Checkpoint.load(folder, device=config.device)
    source = open_source(config.attributes, config.device) if config.attributes else None
    data = config.data
    if data is None:
        if not (folder.parent / "faces.npz").is_file():
            raise UserError(
                f"--data: name a set of faces with captions and questions; {run} has no faces.npz of its own"
            )
        data = SetConfig(str(folder.parent / "faces.npz"))
    side = checkpoint.image_tokenizer.config.side
    faces = open_faces(
        data, side, config.frame, config.faces or FACES[suite], config.questions, config.seed, source
    )  # fmt: skip
    weights = sorted(folder.glob("model*.safetensors"))
    claim(out, {
        "suite": suite, "weights": [checksums.sha256(each) for each in weights], "faces": faces.fingerprint,
        "paint": asdict(config.paint), "answer_tokens": config.answer_tokens, "caption_tokens": config.caption_tokens,
        "attributes": config.attributes, "identity": config.identity, "seed": config.seed,
    })  # fmt: skip
    with Work(checkpoint, out) as work:
        measured = Suite(work, faces, config)
        rows = measured.rows(suite)
        result = {
            "run": name_of(run), "suite": suite, "data": faces.name, "faces": len(faces.items),
            "fingerprint": faces.fingerprint,
            "left_out": [f"{where}: {reason}" for where, reason in faces.left_out[:SHOWN]],
            "left_out_count": len(faces.left_out), "config": checkpoint.model.config.to_dict(),
            "seed": config.seed, "rows": [row.plain() for row in rows], "shown": measured.shown(),
            "endpoints": measured.asker.spent if config.asked else {},
        }  # fmt: skip
    write_json(out / "result.json", result)
    return result


def ready(config: SuiteConfig) -> None:
    """That what models are asked with is there, before anything is painted for them.

    Raises:
        UserError: a package is not installed, or an endpoint's API key is not set.
    """
    if config.asked:
        try:
            import unif2ace.evaluation.asker  # noqa: F401
        except ModuleNotFoundError as error:
            names = ", ".join(config.asked)
            raise UserError(f"{names}: {error.name} is not installed: pip install 'unif2ace[evaluation]'") from error
    for name, endpoint in config.endpoints.items():
        endpoint.secret(name)


def told(result: dict[str, Any]) -> str:
    """A result for the terminal."""
    lines = [f"{result['run']}: {result['suite']} suite, {result['faces']} faces of {result['data']}"]
    for row in result["rows"]:
        if row["value"] is None:
            lines.append(f"  {row['title']:<28}not measured: {row['reason']}")
            continue
        digits = MEASURES[row["name"]].digits
        span = "" if row["low"] is None else f"  [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        lines.append(f"  {row['title']:<28}{row['value']:>9.{digits}f}{span}")
    return "\n".join(lines)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Hold `folder` for results of these settings alone.

    Raises:
        UserError: it holds results of others; the first setting that differs is named.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    before = read_json(path) if path.exists() else settings
    for name in settings:
        if settings[name] != before.get(name):
            raise UserError(f"{folder} holds results of another {name}: name another --out, or delete it")
    write_json(path, settings)


def _read_features(path: Path) -> np.ndarray:
    with reading(path, "array", "delete it and run again"):
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # mapped: no more than the file has


class Suite:
    """The rows of one model, each by a method of its name."""

    def __init__(self, work: Work, faces: Faces, config: SuiteConfig) -> None:
        self.work, self.faces, self.config = work, faces, config
        self._paintings: list[tuple[Face, str, np.ndarray]] | None = None
        self._features: dict[str, np.ndarray] = {}
        self._inception: Inception | None = None
        self._agreed: dict[str, dict[str, bool]] = {}

    @cached_property
    def asker(self) -> Asker:
        from unif2ace.evaluation.asker import Asker  # it needs packages that no other row does

        return Asker(self.work, self.config)

    def rows(self, suite: str) -> list[Row]:
        """Every row of the suite, in its order."""
        made: dict[str, Callable[[str], Row]] = {
            "fid": self.fid, "kid": self.kid, "fid_tokenizer": self.fid_tokenizer, "agreement": self.agreement,
            "identity": self.identity, "identity_others": self.identity, "vqascore": self.vlm, "vlm_score": self.vlm,
            "desc_gpt": self.judged, "conv_gpt": self.judged, "desc_ds": self.judged, "conv_ds": self.judged,
            "vqa_exact": self.vqa, "vqa_soft": self.vqa, "caption_agreement": self.caption_agreement,
        }  # fmt: skip
        found = []
        for name in SUITES[suite]:
            try:
                found.append(made[name](name))
            except (Absent, UserError) as error:
                found.append(Row(name, reason=str(error)))
        return found

    @property
    def paintings(self) -> list[tuple[Face, str, np.ndarray]]:
        """Faces with a caption, the caption, and what was painted from it."""
        if self._paintings is None:
            if not self.faces.captioned:
                raise Absent("no face of the set has a caption to paint from")
            done = self.work.paint(self.faces.captioned, replace(self.config.paint, seed=self.config.seed))
            kept = [(face, done.get(face.key)) for face in self.faces.captioned]
            self._paintings = [(face, each["prompt"], self.work.painting(each)) for face, each in kept if each]
        if not self._paintings:
            raise Absent("no caption fits into the model's prompt")
        return self._paintings

    def features(self, what: str) -> np.ndarray:
        """Inception features of the faces, the paintings or the faces through the tokenizer."""
        if what not in self._features:
            path = self.work.folder / f"inception-{what}.npy"
            if path.exists():
                self._features[what] = _read_features(path)
            else:
                real = np.stack([face.image for face in self.faces.items])
                images = {
                    "faces": lambda: real, "rebuilt": lambda: self.work.rebuilt(real),
                    "paintings": lambda: np.stack([image for *_, image in self.paintings]),
                }[what]()  # fmt: skip
                self._inception = self._inception or Inception(self.config.device)
                with tqdm(total=len(images), desc=f"features: {what}", unit="picture") as bar:
                    self._features[what] = self._inception(images, bar.update)
                with replacing(path) as partial, partial.open("wb") as file:
                    np.save(file, self._features[what])
        return self._features[what]

    def fid(self, name: str) -> Row:
        return self._distance(name, distances.frechet, "paintings", 1.0)

    def kid(self, name: str) -> Row:
        return self._distance(name, distances.kid, "paintings", 1000.0)

    def fid_tokenizer(self, name: str) -> Row:
        return self._distance(name, distances.frechet, "rebuilt", 1.0)

    def _distance(self, name: str, distance: distances.Distance, what: str, scale: float) -> Row:
        first, second = self.features(what), self.features("faces")
        if min(len(first), len(second)) < 2:
            raise Absent("it needs at least two pictures of each")
        value = scale * distance(first, second)
        error = scale * distances.spread(distance, first, second, self.config.seed)
        how = f"{len(first)} pictures to {len(second)} faces; interval: 1.96 standard errors of the bootstrap"
        return Row(name, value, value - 1.96 * error, value + 1.96 * error, len(first), len(first), how=how)

    def agreement(self, name: str) -> Row:
        source = self.faces.source
        if source is None:
            raise Absent("nothing measures attributes: name --attributes=classifier:FOLDER or face-parser:FILE")
        painted = [self.faces.told(prompt) for _, prompt, _ in self.paintings]
        seen = source([image for *_, image in self.paintings])
        itself = source([face.image for face, *_ in self.paintings])
        keys, categories, right, ceiling = [], [], [], []
        for (face, *_), told, found, own in zip(self.paintings, painted, seen, itself):
            has, had = ({each.category: each.value for each in each_of} for each_of in (found, own))
            for category, value in told.items():
                if category in has:
                    keys.append(face.key)
                    categories.append(category)
                    right.append(float(has[category] == value))
                    self._agreed.setdefault(face.key, {})[category] = has[category] == value
                if category in had:
                    ceiling.append(had[category] == value)
        if not right:
            raise Absent(f"no prompt tells an attribute that {source.name} sees")
        bound = f"; the faces themselves: {np.mean(ceiling):.3f}" if ceiling else ""
        return Row.of(name, mean(right, keys), f"{source.name}{bound}", by=_by_attribute(categories, right))

    def identity(self, name: str) -> Row:
        """Cosines alone are kept; vectors are let go."""
        from unif2ace.data.identity import FRAME
        from unif2ace.encoders import FaceCountError, encoder

        own = self.work.checkpoint.processor.encoders.get("identity", "sface").partition(":")[0]
        wanted = self.config.identity
        if wanted is None:
            others = [each for each in ("arcface-mbf", "sface", "antelopev2:FOLDER") if each.partition(":")[0] != own]
            raise Absent(f"no encoder is named: --identity={' or '.join(others)}; {own} is the model's own")
        if wanted.partition(":")[0] == own:
            raise Absent(f"{own} is what the model itself is given: a model is not measured by it; name another")
        done = self.work.journal("identity")
        if any(face.key not in done for face, *_ in self.paintings):
            options: dict[str, Any] = {"frame": FRAME} if self.config.frame == "face" else {"largest": True}
            read = encoder(wanted, device=self.config.device, **options)
            vectors: list[tuple[str, Any, Any]] = []
            for face, _, image in self.paintings:
                try:
                    real, painted = read([face.image, image])
                    vectors.append((face.key, real, painted))
                except FaceCountError:
                    done.put(face.key, {"same": None, "other": None})
            for (key, real, painted), (_, other, _) in zip(vectors, vectors[1:] + vectors[:1]):
                done.put(key, {"same": float(real @ painted), "other": float(other @ painted)})
        kept = [done.get(face.key) for face, *_ in self.paintings]
        found = [each for each in kept if each["same"] is not None]
        if not found:
            raise Absent(f"{wanted} finds a face in none of the paintings")
        if name == "identity_others" and len(found) == 1:
            raise Absent(f"{wanted} finds a face in one painting alone: there is no other")
        values = [each["same" if name == "identity" else "other"] for each in found]
        return Row.of(name, mean(values), f"{wanted}; no face found in {len(kept) - len(found)}")

    def vlm(self, name: str) -> Row:
        if self.config.vlm is None:
            raise Absent("no vision-language model is named: --vlm.folder=FOLDER or --vlm.endpoint.url=...")
        return self.asker.looked(name, self.paintings)

    def judged(self, name: str) -> Row:
        kind, _, who = name.partition("_")
        if getattr(self.config, f"judge_{who}") is None:
            raise Absent(f"no judge is named: --judge_{who}.url=... and --judge_{who}.model=...")
        return self.asker.described(name, self.captions) if kind == "desc" else self.asker.answered(name, self.answers)

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        if not self.faces.asked:
            raise Absent("no face of the set has a question")
        return dict(self.work.answer(self.faces.asked, self.config.answer_tokens).items())

    @property
    def captions(self) -> list[dict[str, Any]]:
        if not self.faces.captioned:
            raise Absent("no face of the set has a caption to hold one against")
        return [each for _, each in self.work.describe(self.faces.captioned, self.config.caption_tokens).items()]

    def vqa(self, name: str) -> Row:
        rate = exact if name == "vqa_exact" else soft
        answers = list(self.answers.values())
        if not answers:
            raise Absent("no question fits into the model's room for one")
        values = [rate(each["given"], each["references"]) for each in answers]
        by = {key: tally([each[key] for each in answers], values) for key in ("kind", "category")}
        return Row.of(name, mean(values, [each["face"] for each in answers]), by=by)

    def caption_agreement(self, name: str) -> Row:
        keys, categories, right = [], [], []
        for each in self.captions:
            given = self.faces.told(each["given"])
            for category, value in self.faces.told(each["references"][0]).items():
                keys.append(each["face"])
                categories.append(category)
                right.append(float(given.get(category) == value))
        if not right:
            raise Absent("no reference caption tells an attribute that is known")
        return Row.of(name, mean(right, keys), by=_by_attribute(categories, right))

    def shown(self) -> dict[str, Any]:
        """What the report shows: the first paintings, those that miss most of their prompt, and wrong answers."""
        made = {"paintings": self.work.journal("paintings"), "answers": self.work.journal("answers")}
        keys = [key for key, _ in made["paintings"].items()]
        missed = {key: sum(not ok for ok in each.values()) for key, each in self._agreed.items()}
        worst = sorted((key for key in missed if missed[key]), key=lambda key: (-missed[key], key))[:SHOWN]
        wrong = [
            each for _, each in made["answers"].items() if not exact(each["given"], each["references"])
        ]  # fmt: skip
        return {
            "paintings": [{"face": key, **made["paintings"].get(key)} for key in keys[:SHOWN]],
            "missed": [
                {"face": key, **made["paintings"].get(key),
                 "missed": [name for name, ok in self._agreed[key].items() if not ok]}
                for key in worst
            ],
            "wrong": [wrong[len(wrong) * place // SHOWN] for place in range(SHOWN)] if len(wrong) > SHOWN else wrong,
            "wrong_count": len(wrong),
        }  # fmt: skip
