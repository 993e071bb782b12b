"""The rows of models that are asked: a vision-language model in a folder or at an endpoint, judges at endpoints.

What they said is kept in the results' folder; rows that ask one endpoint share its folder, and so its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unif2ace import checksums
from unif2ace.endpoint.client import Endpoint
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.endpoint.prompts import Prompt
from unif2ace.evaluation import judge, vlm
from unif2ace.evaluation.config import SuiteConfig
from unif2ace.evaluation.faces import Face
from unif2ace.evaluation.intervals import mean
from unif2ace.evaluation.judge import Item
from unif2ace.evaluation.rows import Absent, Row
from unif2ace.evaluation.work import Work
from unif2ace.files import digest

_READ = ("*.json", "*.jinja", "*.safetensors")  # what a local model's scores hang on


class Asker:
    """Asks the models that `config` names.

    Attributes:
        spent: of each endpoint: requests, tokens, cost.
    """

    def __init__(self, work: Work, config: SuiteConfig) -> None:
        self.work, self.config = work, config
        self.spent: dict[str, dict[str, Any]] = {}

    def looked(self, name: str, paintings: Sequence[tuple[Face, str, np.ndarray]]) -> Row:
        """VQAScore or VLM-score of faces' prompts and paintings."""
        config = self.config.vlm
        assert config is not None
        if config.folder is not None:
            return self._here(name, Path(config.folder), paintings)
        assert config.endpoint is not None
        items = [Item(name, face.key, {"caption": prompt}, image) for face, prompt, image in paintings]
        if name == "vqascore":
            note = "share of yes over the repetitions, not a probability; "
            return self._ask(name, "vlm", config.endpoint, judge.prompt_of("vqascore"), items, judge.said_yes, note)
        return self._ask(name, "vlm", config.endpoint, judge.prompt_of("vlm-score"), items, vlm.rating)

    def described(self, name: str, captions: Iterable[Mapping[str, Any]]) -> Row:
        """A judge's scores of captions, each against its face's first."""
        items = [
            Item("caption", each["face"], {"reference": each["references"][0], "given": each["given"]})
            for each in captions
        ]
        return self._judge(name, "judge-description", items)

    def answered(self, name: str, answers: Mapping[str, Mapping[str, Any]]) -> Row:
        """A judge's scores of answers, each against all that are right."""
        items = [
            Item(key, each["face"],
                 {"question": each["question"], "reference": " / ".join(each["references"]), "given": each["given"]})
            for key, each in answers.items()
        ]  # fmt: skip
        return self._judge(name, "judge-answer", items)

    def _judge(self, name: str, prompt: str, items: list[Item]) -> Row:
        who = f"judge_{name.partition('_')[2]}"
        return self._ask(name, who, getattr(self.config, who), judge.prompt_of(prompt), items, judge.judged)

    def _here(self, name: str, folder: Path, paintings: Sequence[tuple[Face, str, np.ndarray]]) -> Row:
        """By a model in a folder: another's scores, or another prompt's, are not taken for its own."""
        prompt = judge.prompt_of({"vqascore": "vqascore", "vlm_score": "vlm-score"}[name])
        files = sorted(each for pattern in _READ for each in folder.glob(pattern))
        model = digest(prompt.version.encode(), *(f"{each.name} {checksums.sha256(each)}".encode() for each in files))
        done = self.work.journal(f"{name}-{model}")
        missing = [each for each in paintings if each[0].key not in done]
        if missing:
            local = vlm.LocalModel(folder, self.config.device)
            rate: Callable[..., Sequence[float | None]] = local.vqascore if name == "vqascore" else local.vlm_score
            for face, caption, image in missing:
                done.put(face.key, rate([image], [caption])[0])
        values = {face.key: done.get(face.key) for face, *_ in paintings}
        told = [value for value in values.values() if value is not None]
        if not told:
            raise Absent("the model said a number of none of the paintings")
        return Row.of(name, mean(told), f"{folder.name}; no number in {len(values) - len(told)}")

    def _ask(
        self, name: str, who: str, config: EndpointConfig, prompt: Prompt, items: list[Item],
        score: Callable[[Any], float | None], note: str = "",
    ) -> Row:  # fmt: skip
        with Endpoint(config, self.work.folder / "endpoints" / who) as endpoint:
            try:
                verdict = judge.ask(endpoint, prompt, items, self.config.repeats, score)
            finally:
                self.spent[who] = endpoint.counts()
        if not verdict.asked:
            raise Absent(f"{config.model} answered none of {len(items) * self.config.repeats} questions as asked")
        spread = verdict.spread
        how = (
            f"{note}{config.model}, prompt {prompt.name} {prompt.version}, asked {self.config.repeats} times"
            + (f", means spread by {spread:.3f}" if spread is not None else "")
            + (f"; {verdict.refused} never answered as asked" if verdict.refused else "")
            + (f"; {verdict.missing} not answered yet: run it again" if verdict.missing else "")
        )
        return Row.of(name, mean([each.score for each in verdict.asked], [each.face for each in verdict.asked]), how)
