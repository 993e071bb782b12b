"""What `unif2ace build-dataset` is told, as dataclasses that name the key that is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from unif2ace.data.encode import EncodingConfig
from unif2ace.endpoint.config import EndpointConfig
from unif2ace.errors import UserError


@dataclass(frozen=True)
class ImagesConfig:
    """Where pictures come from: one of three.

    Attributes:
        path: a folder of picture files, with the folders in it.
        faces: a file of synthetic faces that the demo made (faces.npz).
        synthetic: so many synthetic faces are made.
        limit: at most so many pictures, the first; 0: all.
        seed: of the synthetic faces.
    """

    path: str | None = None
    faces: str | None = None
    synthetic: int = 0
    limit: int = 0
    seed: int = 0


@dataclass(frozen=True)
class FacesConfig:
    """What a picture must hold.

    Attributes:
        bystanders: take the largest of several faces, instead of none.
        side: least pixels of the framed face's side.
        blur: least variance of the Laplacian of the face at 112 pixels, light in [0, 255]; a sharp portrait has
            hundreds, one that was enlarged fourfold tens.
        dark, bright: bounds of the face's mean light, in [0, 255].
        clipped: largest share of its pixels that are quite black or quite white.
        same: cosine of two faces' SFace vectors from which the later picture is a duplicate. Two pictures of one
            person are mostly below 0.8; 1: none is.
    """

    bystanders: bool = False
    side: int = 128
    blur: float = 20.0
    dark: float = 30.0
    bright: float = 230.0
    clipped: float = 0.4
    same: float = 0.9


@dataclass(frozen=True)
class AttributesConfig:
    """Attributes:
    sources: what reads attributes off the faces: `classifier:FOLDER` (of `unif2ace train-attributes`),
        `face-parser:FILE`, `measured:FACES.npz` (`measured` for synthetic faces), or `MODULE:FUNCTION`, which gives
        an AttributeSource. They are combined as `unif2ace.attributes.combine` says.
    least: probability from which an attribute is taken for true.
    """

    sources: tuple[str, ...] = ()
    least: float = 0.7


@dataclass(frozen=True)
class CaptionsConfig:
    """Attributes:
    prompt, correct, words: prompts, by name or file: to describe a picture; to mend a caption that is wrong or poor by
        what attributes say; to make a caption of attributes alone, where the endpoint sees nothing.
    facts: attributes that a captioner without eyes is told, drawn by lot; 0: all.
    least_facts: attributes that a caption must tell.
    shortest, longest: words and punctuation marks of a caption.
    """

    prompt: str = "caption"
    correct: str = "correct"
    words: str = "caption-words"
    facts: int = 0
    least_facts: int = 1
    shortest: int = 8
    longest: int = 300


@dataclass(frozen=True)
class QuestionsConfig:
    """Attributes:
    prompt: by name or file.
    count: pairs asked for.
    facts: attributes that the writer is told, drawn by lot; 0: all.
    apart: each pair is asked for by itself, with `facts` of its own.
    unsupported: keep pairs that no attribute speaks for or against.
    longest_question, longest_answer: in words.
    alike: share of words from which two questions on one face are one.
    """

    prompt: str = "questions"
    count: int = 4
    facts: int = 0
    apart: bool = False
    unsupported: bool = True
    longest_question: int = 40
    longest_answer: int = 60
    alike: float = 0.8


@dataclass(frozen=True)
class CardConfig:
    """What nobody but the user knows of a set of faces; without it no set is built.

    Attributes:
        license: under which the set may be used, as Hugging Face names it.
        consent: how the people in the pictures agreed, or why there are none.
        source: where the pictures come from, and under which licences.
        name: of the set.
        contact: whom a person asks who wants to be taken out.
    """

    license: str = ""
    consent: str = ""
    source: str = ""
    name: str = "faces"
    contact: str = ""

    def check(self, where: str = "card") -> CardConfig:
        """The config itself; UserError names a field that is not filled."""
        for name, asked in (
            ("license", "the licence of the set, as Hugging Face names it (cc-by-4.0)"),
            ("consent", "how the people in the pictures agreed to this use, or why there are none"),
            ("source", "where the pictures come from, and under which licences"),
            ("contact", "whom a person asks who wants to be taken out"),
        ):
            value = getattr(self, name).strip()
            if len(value) < 3 or value.lower() in ("todo", "tbd", "n/a", "none", "unknown", "...", "xxx"):
                raise UserError(f"{where}.{name}: it must be filled: {asked}; no set of faces is built without it")
        return self


@dataclass(frozen=True)
class BuildConfig:
    """Attributes:
    images: what to build from.
    out: folder of the set.
    captioner: an endpoint that describes pictures.
    writer: one that corrects captions and writes questions; the captioner, where there is none.
    faces, attributes, captions, questions: of the stages.
    card: what the set's card must say.
    encoding: also write shards of codes and features, as `unif2ace precompute` does.
    """

    out: str
    captioner: EndpointConfig
    images: ImagesConfig = ImagesConfig()
    writer: EndpointConfig | None = None
    faces: FacesConfig = FacesConfig()
    attributes: AttributesConfig = AttributesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    questions: QuestionsConfig = QuestionsConfig()
    card: CardConfig = field(default_factory=CardConfig)
    encoding: EncodingConfig | None = None

    def check(self) -> BuildConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible, or a field of the card is empty; the message names the key.
        """
        self.card.check()
        images = self.images
        given = [name for name in ("path", "faces", "synthetic") if getattr(images, name)]
        if len(given) != 1:
            raise UserError(f"images: expected one of path, faces and synthetic, got {', '.join(given) or 'none'}")
        if min(images.synthetic, images.limit, images.seed) < 0:
            raise UserError("images: expected synthetic, limit and seed of at least 0")
        if not -1 <= self.faces.same <= 1:
            raise UserError(f"faces.same: expected a cosine, got {self.faces.same}")
        if not 0 <= self.attributes.least <= 1:
            raise UserError(f"attributes.least: expected a probability, got {self.attributes.least}")
        if self.questions.apart and not self.questions.facts:
            raise UserError("questions.facts: expected at least 1 where questions.apart is true")
        if self.questions.count < 0 or self.captions.facts < 0 or self.questions.facts < 0:
            raise UserError("questions.count, captions.facts and questions.facts: expected at least 0")
        self.captioner.check("captioner").secret("captioner")
        if self.writer is not None:
            self.writer.check("writer").secret("writer")
        if not self.captioner.vision and not self.attributes.sources:
            raise UserError(
                "captioner.vision is false, so that captions are made of attributes: attributes.sources: expected one"
            )
        if self.encoding is not None:
            self.encoding.check("encoding")
        return self
