"""What `data:` of a training config holds, as dataclasses that name the key that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from unif2ace import settings

TASKS = ("t2i", "mmu", "lm")
KINDS = ("auto", "llava", "parquet", "datasets", "shards")


@dataclass(frozen=True)
class FieldMap:
    """Where a record has what we need. A dot reaches into a record within; None: these records have no such field.

    Attributes:
        key: name of the sample, for messages.
        image: file name below the image folder, or the file's bytes (or {bytes, path}, as `datasets` has it).
        caption: one caption or a list of them.
        conversations: a list of turns {from, value} or {role, content}, a list of {question, answer}, a list of such
            lists, or any of these as a JSON string.
        question, answer: two fields that make one turn, where the record is a single question.
        text: plain text, for lm rows.
    """

    key: str | None = "id"
    image: str | None = "image"
    caption: str | None = "caption"
    conversations: str | None = "conversations"
    question: str | None = "question"
    answer: str | None = "answer"
    text: str | None = "text"

    def asked(self) -> dict[str, str]:
        """Fields that were named otherwise than by default: they must be there."""
        default = FieldMap()
        return {k: v for k, v in vars(self).items() if v is not None and v != getattr(default, k)}


@dataclass(frozen=True)
class SetConfig:
    """One set of samples.

    Attributes:
        path: a .json or .jsonl file (LLaVA), a .parquet file or folder of them, a folder that `datasets` saved, or a
            folder of shards (.tar): what `unif2ace precompute` wrote, or another's.
        kind: of KINDS; `auto` goes by the path.
        images: folder of the image files; by default the one that `path` is in.
        fields: see `FieldMap`.
        tasks: what the set is used for, of TASKS.
    """

    path: str
    kind: str = "auto"
    images: str | None = None
    fields: FieldMap = FieldMap()
    tasks: tuple[str, ...] = ("t2i", "mmu")


@dataclass(frozen=True)
class MixConfig:
    """Weights of the tasks in a step's rows; only their ratios count."""

    t2i: float = 24.0
    mmu: float = 20.0
    lm: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Attributes:
    sets: where samples come from.
    batch: rows of one step over all ranks and micro-batches.
    mix: weights of the tasks; each step has exactly the rows that `counts` says.
    questions: at most so many questions on one face, each with its answer, in one mmu row.
    describe: questions whose answer is the face's caption, one more conversation of each captioned face; () for none.
    guidance_dropout: share of t2i rows whose caption is left out, for classifier-free guidance.
    text_length: most tokens after the image in an mmu row; 0: as many as make it as long as a t2i row.
    lm_length: tokens of an lm row, packed full; 0: as long as a t2i row.
    fixed_length: pad every row to the longest that there can be, so that shapes never change.
    over_long: a text that does not fit is cut (`truncate`) or another sample takes its place (`drop`); both counted.
    max_corrupt: samples that cannot be read are passed over up to this many, then the run stops.
    workers: processes that make rows beside the training; 0: none.
    prefetch: steps that a worker makes in advance.
    cache: folder for the token files of lm sets; by default beside the set.
    seed: of the order and of everything that is drawn.
    """

    sets: tuple[SetConfig, ...] = ()
    batch: int = 44
    mix: MixConfig = MixConfig()
    questions: int = 3
    describe: tuple[str, ...] = ("describe the face.",)
    guidance_dropout: float = 0.1
    text_length: int = 0
    lm_length: int = 0
    fixed_length: bool = False
    over_long: str = "truncate"
    max_corrupt: int = 100
    workers: int = 0
    prefetch: int = 4
    cache: str | None = None
    seed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each task in every step, `batch` in all: largest remainders, the first task wins a tie."""
        weights = {task: getattr(self.mix, task) for task in TASKS}
        shares = {task: self.batch * weight / sum(weights.values()) for task, weight in weights.items()}
        counts = {task: int(share) for task, share in shares.items()}
        by_remainder = sorted(TASKS, key=lambda task: counts[task] - shares[task])
        for task in by_remainder[: self.batch - sum(counts.values())]:
            counts[task] += 1
        return counts

    def check(self, where: str = "data") -> DataConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible; the message names its key below `where`.
        """
        need = partial(settings.need, self, where=where)
        need(len(self.sets) > 0, "sets", "at least one set")
        for index, each in enumerate(self.sets):
            need(each.kind in KINDS, f"sets[{index}].kind", f"one of {', '.join(KINDS)}")
            right = len(each.tasks) > 0 and set(each.tasks) <= set(TASKS)
            need(right, f"sets[{index}].tasks", f"some of {', '.join(TASKS)}")
        for task in TASKS:
            need(0 <= getattr(self.mix, task) < float("inf"), f"mix.{task}", "a weight of at least 0")
        need(self.mix.t2i + self.mix.mmu + self.mix.lm > 0, "mix", "a weight above 0")
        need(self.batch >= 1, "batch", "at least 1")
        for task, count in self.counts.items():
            need(count > 0 or getattr(self.mix, task) == 0, "batch", f"enough rows that mix.{task} gets one")
            fed = any(task in each.tasks for each in self.sets)
            need(fed or not count, f"mix.{task}", f"0, as no set has {task} among its tasks")
        need(0 <= self.guidance_dropout <= 1, "guidance_dropout", "a probability")
        need(self.over_long in ("truncate", "drop"), "over_long", "truncate or drop")
        need(self.questions >= 1, "questions", "at least 1")
        need(self.prefetch >= 1, "prefetch", "at least 1")
        for index, text in enumerate(self.describe):
            need(bool(text.strip()), f"describe[{index}]", "a text")
        for key in ("text_length", "lm_length", "max_corrupt", "workers"):
            need(getattr(self, key) >= 0, key, "at least 0")
        need(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1")
        return self
