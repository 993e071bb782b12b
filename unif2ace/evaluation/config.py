"""What `unif2ace evaluate` is told: the faces, how they are painted and asked about, and who measures what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from unif2ace import settings
from unif2ace.data.config import SetConfig
from unif2ace.data.encode import FRAMES
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.errors import UserError
from unif2ace.model.painting import PaintSettings


@dataclass(frozen=True)
class VlmConfig:
    """A vision-language model: `folder` of transformers on this machine, or `endpoint` that sees pictures."""

    folder: str | None = None
    endpoint: EndpointConfig | None = None


@dataclass(frozen=True)
class SuiteConfig:
    """Attributes:
    data: faces with captions and questions; by default a demo run's faces.npz beside its checkpoint.
    frame: `face` finds the face and brings it into the model's frame; `square` takes the middle of the picture.
    faces: how many; 0: 100 in the quick suite, 1000 in the paper's.
    questions: at most so many of a face.
    paint: how paintings are sampled.
    answer_tokens, caption_tokens: longest answer and caption.
    attributes: what measures attributes: `classifier:FOLDER` of `unif2ace train-attributes`, `face-parser:FILE`, or
        `measured:FACES.npz`, which a demo run's faces have by default.
    identity: encoder of `unif2ace.encoders` for the identity cosine; another than the model's own.
    vlm: for VQAScore and VLM-score. judge_gpt, judge_ds: for the Desc- and Conv- scores.
    repeats: how often a judge is asked the same.
    device: where networks compute. seed: of everything that is drawn.
    """

    data: SetConfig | None = None
    frame: str = "face"
    faces: int = 0
    questions: int = 16
    paint: PaintSettings = PaintSettings()
    answer_tokens: int = 16
    caption_tokens: int = 64
    attributes: str | None = None
    identity: str | None = None
    vlm: VlmConfig | None = None
    judge_gpt: EndpointConfig | None = None
    judge_ds: EndpointConfig | None = None
    repeats: int = 3
    device: str = "cpu"
    seed: int = 0

    def check(self) -> SuiteConfig:
        """The config itself; UserError names a key that is wrong."""
        need = partial(settings.need, self)
        need(self.frame in FRAMES, "frame", f"one of {', '.join(FRAMES)}")
        need(self.faces >= 0, "faces", "at least 0")
        for name in ("questions", "answer_tokens", "caption_tokens", "repeats"):
            need(getattr(self, name) >= 1, name, "at least 1")
        if self.vlm is not None:
            if (self.vlm.folder is None) == (self.vlm.endpoint is None):
                raise UserError("vlm: expected one of folder and endpoint")
            if self.vlm.endpoint is not None and not self.vlm.endpoint.vision:
                raise UserError("vlm.endpoint.vision: expected true, of a model that sees pictures")
        for name, endpoint in self.endpoints.items():
            endpoint.check(name)
        return self

    @property
    def asked(self) -> list[str]:
        """The keys of the models that are asked."""
        return [name for name in ("vlm", "judge_gpt", "judge_ds") if getattr(self, name) is not None]

    @property
    def endpoints(self) -> dict[str, EndpointConfig]:
        """Of those that are asked at one, by their keys."""
        seeing = self.vlm.endpoint if self.vlm is not None else None
        named = {"vlm.endpoint": seeing, "judge_gpt": self.judge_gpt, "judge_ds": self.judge_ds}
        return {name: each for name, each in named.items() if each is not None}
