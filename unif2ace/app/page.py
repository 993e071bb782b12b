"""The page: three tabs over `actions.Studio`. Fonts are the system's; nothing is fetched from anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from unif2ace.app.actions import EDITOR_SIDE, LARGEST_COUNT, Studio, enlarged
from unif2ace.data import captions
from unif2ace.errors import UserError
from unif2ace.generation.image import PaintSettings

PROMPTS = {
    "Dark hair, a smile": "a person with dark hair, big smile, bare forehead, facing ahead, soft light, dark clothes, "
    "bright cool plain background",
    "In a garden": "photo of a face with medium hair, big smile, covered forehead, facing ahead, strong light, "
    "bright clothes, medium warm green background",
    "Looking left, blue": "portrait of a person with dark hair, closed mouth, bare forehead, facing left, soft light, "
    "medium clothes, dark cool plain background",
}
FIRST = next(iter(PROMPTS.values()))
NOTICE = (
    "Everything painted here is made by a model and shows no real person; each picture carries {mark}. Answers say how "
    "a face **looks** to the model, not who or what anybody is. Do not use it to identify, judge or imitate people; "
    "give it only pictures whose subject agrees. Nothing leaves this machine, and pictures go when the app stops."
)
CSS = """
.gradio-container { max-width: 72rem !important; margin: auto }
.painting button, .painting .image-container, .painting .image-frame, .painting img { width: 100% !important }
.painting img { height: auto; object-fit: contain }
.seen button, .seen .image-container, .seen .image-frame, .seen img { width: 100% !important; height: 100% !important }
.seen img { object-fit: contain }
.status { min-height: 1.5rem }
.notice { font-size: .85rem; opacity: .8 }
footer { display: none !important }
"""
THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    radius_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def page(studio: Studio) -> gr.Blocks:
    """The page as gradio Blocks; `server.serve` shows it."""
    defaults = PaintSettings()

    def sampling_options() -> list[Any]:
        with gr.Accordion("Options", open=False):
            return [
                gr.Slider(1, 64, defaults.steps, step=1, label="Steps"),
                gr.Slider(0, 8, defaults.guidance, step=0.1, label="Guidance: how closely the prompt is followed"),
                gr.Number(0, precision=0, minimum=0, label="Seed: one seed, one picture"),
            ]

    def pictures(label: str) -> list[Any]:
        gr.Markdown(f"**{label}**")
        shown: dict[str, Any] = {"interactive": False, "format": "png", "elem_classes": "painting", "show_label": False}
        painting = gr.Image(buttons=["download", "fullscreen"], **shown)
        gr.Markdown("Step by step; grey is not yet decided")
        strip = gr.Image(buttons=[], **shown)
        return [painting, strip, gr.Markdown(elem_classes="status")]

    with gr.Blocks(title="UniF2ace", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(
            "# UniF2ace\nOne model that paints faces from text, answers questions about a face, and paints parts anew."
        )
        with gr.Tab("Paint"), gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(FIRST, label="What should the face be like?", lines=2, elem_id="paint-prompt")
                count = gr.Slider(1, LARGEST_COUNT, 4, step=1, label="How many faces")
                options = sampling_options()
                button = gr.Button("Paint", variant="primary", elem_id="paint")
                gr.Examples(
                    [[each] for each in PROMPTS.values()], prompt, label="Prompts to try", example_labels=list(PROMPTS)
                )
            with gr.Column(scale=3):
                painted = pictures("Painting")
            button.click(_steps(studio.paint), [prompt, count, *options], painted, concurrency_id="model")
        with gr.Tab("Ask"), gr.Row():
            with gr.Column(scale=2):
                uploaded = gr.Image(
                    label="A picture with one face", sources=["upload", "clipboard"], height=240, elem_id="ask-picture"
                )
                seen = gr.Image(
                    label="What the model sees of it", interactive=False, elem_classes="seen", buttons=[],
                    format="png", height=240,
                )  # fmt: skip
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Questions and answers", height=420, buttons=[], feedback_options=None)
                question = gr.Textbox(label="Question", submit_btn="Ask", elem_id="question")
                gr.Examples([[captions.questions(index)[0]] for index in range(6)], question, label="Questions to try")
            question.submit(_asking(studio), [uploaded, question, chat], [seen, chat, question], concurrency_id="model")
            uploaded.clear(lambda: (None, []), None, [seen, chat])
        with gr.Tab("Paint anew"), gr.Row():
            with gr.Column(scale=3):
                source = gr.Image(
                    label="A picture with one face", sources=["upload", "clipboard"], height=160, elem_id="anew-picture"
                )
                use = gr.Button("Take the face painted last", size="sm", elem_id="take")
                face = gr.State()
                hint = gr.Markdown("Give a picture, or take the face painted last.", elem_id="hint")
                editor = gr.ImageEditor(
                    label="Draw over what is to be painted anew", sources=[], layers=False, transforms=(),
                    type="numpy", brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=40),
                    eraser=gr.Eraser(default_size=40), height=440, elem_id="editor", canvas_size=(EDITOR_SIDE,) * 2,
                )  # fmt: skip
                box = gr.Textbox(
                    label="Or a box instead: left, top, right, bottom in percent", placeholder="25, 60, 75, 85",
                    elem_id="box",
                )  # fmt: skip
            with gr.Column(scale=3):
                words = gr.Textbox(FIRST, label="What should the face be like?", lines=2, elem_id="anew-prompt")
                options = sampling_options()
                again = gr.Button("Paint anew", variant="primary", elem_id="repaint")
                repainted = pictures("Result")
            source.upload(_framing(studio), source, [face, editor, hint])
            use.click(_framing_painted(studio), painted[0], [face, editor, hint])
            again.click(
                _steps(lambda *given: studio.repaint(given[0], _drawn(*given[:3]), *given[3:])),
                [face, editor, box, words, *options], repainted, concurrency_id="model",
            )  # fmt: skip
        mark = "an invisible watermark that says so" if studio.marked else "no watermark, which was turned off"
        gr.Markdown(NOTICE.format(mark=mark), elem_classes="notice")
    return blocks


def _steps(act):
    """An event that shows every step of a painting; what a user can mend becomes a message."""

    def event(*given) -> Iterator[tuple[str, str, str]]:
        try:
            for shown in act(*given):
                yield str(shown.picture), str(shown.strip), shown.status
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return event


def _asking(studio: Studio):
    def event(picture, question: str, said: list):
        try:
            face, answer = studio.ask(picture, question)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or "(no answer)"}]
        return face, [*said, *turn], ""

    return event


def _framing(studio: Studio):
    def event(picture):
        try:
            face = studio.face(picture)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        drawn_on = {"background": enlarged(face), "layers": [], "composite": None}
        return face, drawn_on, "Draw over the part that is to be painted anew, or give a box."

    return event


def _framing_painted(studio: Studio):
    def event(painting):
        if painting is None:
            raise gr.Error("nothing is painted yet: the first tab does that", print_exception=False)
        return _framing(studio)(painting[: studio.side, : studio.side])

    return event


def _drawn(face: np.ndarray | None, edited: dict | None, box: str) -> np.ndarray:
    """What is to be painted anew, [n, n] bool at the editor's size: the box if there is one, else what was drawn."""
    if face is None:
        raise UserError("give a picture first, or take the face painted last")
    side = len(enlarged(face))
    drawn = np.zeros((side, side), bool)
    if box.strip():
        try:
            left, top, right, bottom = (round(float(each.strip(" %")) * side / 100) for each in box.split(","))
        except ValueError:
            raise UserError(
                f"expected a box of four numbers: left, top, right, bottom in percent, got {box!r}"
            ) from None
        drawn[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
        return drawn
    for layer in (edited or {}).get("layers") or []:
        alpha = layer[..., 3] > 0
        drawn[: alpha.shape[0], : alpha.shape[1]] |= alpha[:side, :side]
    return drawn
