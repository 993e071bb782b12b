"""The folder of a training run as it could have been: stages, resumes, an expert that falls asleep, a slow disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

STAGES = (("pretraining", 0.4, 1e-4), ("joint", 0.4, 1e-4), ("fine", 0.2, 2e-5))
PARTS = ("embedding", "attention", "experts", "routers", "sequence", "injection", "norms", "head")
PROMPTS = (
    "a smiling woman with dark hair",
    "a bald man with a beard",
    "a young face, looking to the left",
    "an old man",
)
QUESTIONS = {
    "is the mouth open ?": "open",
    "what is the hair like ?": "dark, short hair",
    "how old is the face ?": "young",
}


def write_run(folder: Path, steps: int = 3000, total: int | None = None, layers: int = 4, seed: int = 0) -> Path:
    """Write config.yaml, log.jsonl and samples; the run has done `steps` of `total`."""
    rng = np.random.default_rng(seed)
    total = total or steps
    folder.mkdir(parents=True, exist_ok=True)
    resumes = {int(steps * 0.28): 9, int(steps * 0.67): 4}
    spike = int(steps * 0.55)
    lines: list[dict] = [{"event": "started", "step": 0, "time": 1.79e9, "total_steps": total, "ranks": 8}]
    bounds = np.cumsum([0, *(round(total * share) for _, share, _ in STAGES)])
    drift = {layer: rng.normal(0, 0.5, 16) for layer in range(layers)}
    seconds = 0.0
    for step in range(steps):
        index = min(int(np.searchsorted(bounds, step, side="right")) - 1, len(STAGES) - 1)
        name, _, rate = STAGES[index]
        inside, length = step - bounds[index], bounds[index + 1] - bounds[index]
        if inside == 0:
            lines.append(
                {"event": "stage", "step": step, "time": 1.79e9 + seconds, "stage": name, "steps": int(length)}
            )
        if step in resumes:
            lines.append({"event": "resumed", "step": step, "time": 1.79e9 + seconds, "dropped": resumes[step],
                          "total_steps": total, "ranks": 8})  # fmt: skip
        far = step / total
        bump = 1.5 * np.exp(-max(0, step - spike) / (0.01 * total)) * (step >= spike)
        noise = rng.normal(0, 1, 5)
        terms = {
            "mask": 4.1 + 4.9 * (1 + 30 * far) ** -0.6 + 0.08 * noise[0] + bump,
            "score": 190 + 250 * (1 + 30 * far) ** -0.7 + 5 * noise[1] + 20 * bump,
            "mmu": 0.25 + 6.8 * (1 + 60 * far) ** -0.9 * np.exp(0.1 * noise[2]) + bump,
            "lm": 2.9 + 5 * (1 + 40 * far) ** -0.8 + 0.05 * noise[3] if index == 1 else 0.0,
            "balance": 0.08 + 0.06 * np.exp(-far * 20) + 0.002 * noise[4],
            "mask_accuracy": 0.32 * (1 - (1 + 30 * far) ** -0.6),
            "mmu_accuracy": 0.9 * (1 - (1 + 60 * far) ** -0.9),
        }
        bad = step in (spike, spike + 1)
        norm = float(np.exp(rng.normal(0.1, 0.25)) + 8 * bump)
        waited = 0.02 + 0.01 * rng.random() + 0.25 * (0.42 < far < 0.47)
        took = 1.24 * (1 + 0.03 * rng.random()) + waited + 1.5 * (step % 250 == 249)
        seconds += took
        factor = min(1, (inside + 1) / (0.03 * total)) * 0.5 * (1 + np.cos(np.pi * inside / length))
        record = {
            "step": step, "stage": name, "seconds": round(seconds, 3),
            "loss": None if bad else terms["mask"] + terms["mmu"],
            "terms": {key: float(value) for key, value in terms.items()}, "grad_norm": None if bad else norm,
            "lr": rate * factor, "skipped": int(step >= spike) + int(step > spike),
            "corrupt": int(far > 0.3) + 2 * int(far > 0.8), "step_seconds": round(took, 4),
            "data_seconds": round(waited, 4), "rows": {"t2i": 320, "mmu": 128, "lm": 64}, "tokens": 176000,
            "tokens_per_second": round(176000 / took, 1), "mfu": 0.41 * 1.26 / took,
            "memory_bytes": int((61 + 3 * (index > 0)) * 2**30),
        }  # fmt: skip
        if bad:
            record["not_finite"] = {"loss": "nan", "grad_norm": "inf"}
            lines.append({"event": "skipped", "step": step, "time": 1.79e9 + seconds, "loss": None, "grad_norm": None})
        if step % 10 == 0:
            share = rng.dirichlet(np.full(len(PARTS), 30))
            record["grad_norms"] = {part: float(norm * each**0.5) for part, each in zip(PARTS, share)}
            record["experts"] = _experts(drift, rng, 150 / total * (far > 0.4))
        lines.append(record)
        if step and step % (steps // 12) == 0:
            lines.append({"event": "state_saved", "step": step, "time": 1.79e9 + seconds, "seconds": 1.5})
    if steps == total:
        lines.append({"event": "finished", "step": steps, "time": 1.79e9 + seconds})
    text = "\n".join(json.dumps(line) for line in lines) + "\n" + '{"step": 99'
    (folder / "log.jsonl").write_text(text)
    (folder / "config.yaml").write_text(f"run: {folder.name}\nstages: [{{name: a <b>, steps: {total}}}]\n")
    for count in range(1, 6):
        _sample(folder, steps * count // 5, rng)
    return folder


def _experts(drift: dict[int, np.ndarray], rng: np.random.Generator, tired: float) -> list[dict]:
    found = []
    for layer, logits in drift.items():
        logits += rng.normal(0, 0.02, 16) - 0.01 * logits
        if layer == 2:
            logits[1] -= tired
        for level, first, tokens in (("token", 0, 40000), ("sequence", 8, 160)):
            counts = []
            for group in range(2):
                part = np.exp(logits[first + 4 * group : first + 4 * group + 4])
                counts += rng.multinomial(tokens, part / part.sum()).tolist()
            found.append({"level": level, "layer": layer, "counts": counts, "groups": [4, 4], "frequency": [1.0] * 8})
    return found


def _sample(folder: Path, step: int, rng: np.random.Generator) -> None:
    own = folder / "samples" / f"step-{step:08d}"
    own.mkdir(parents=True, exist_ok=True)
    for name, count, blur in (("paintings", len(PROMPTS), 1), ("faces", 2, 0)):
        sheet = Image.new("RGB", (64 * count, 64), "white")
        draw = ImageDraw.Draw(sheet)
        for index in range(count):
            skin = tuple(rng.integers(150, 220, 3).tolist()) if blur else (200, 170, 150)
            draw.ellipse((64 * index + 10, 4, 64 * index + 54, 60), fill=skin, outline="black")
            draw.arc((64 * index + 22, 30, 64 * index + 42, 48), 20, 160, fill="black", width=2)
        sheet.save(own / f"{name}.png")
    answers = [
        {"image": face, "question": question, "answer": answer if rng.random() < 0.8 else "?"}
        for face in range(2)
        for question, answer in QUESTIONS.items()
    ]
    (own / "samples.json").write_text(json.dumps({"step": step, "prompts": PROMPTS, "answers": answers}))
