"""The Draw tab: a concept, a prompt, and what plain sampling and DCI make of them."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from dci.app import inside, markup
from dci.app.drawing import DCI, PLAIN, Drawing, Drawings, draw, watched_alike
from dci.app.events import at_once, private
from dci.app.reading import reading
from dci.app.running import Running
from dci.app.shelf import Shelf
from dci.app.studio import Studio
from dci.app.wanted import MOST_IMAGES, MOST_STEPS, Wanted, command, python
from dci.dual_branch.options import dual_branch, sampling_options
from ldm.errors import UserError
from ldm.solvers import SOLVERS

TITLES = {PLAIN: ("Plain", "the fine-tuned model alone"), DCI: ("DCI", "two branches in the first steps")}
PICK = """
element.addEventListener('click', event => {
    const button = event.target.closest('[data-number]');
    if (button) trigger('select', {number: Number(button.dataset.number)});
});
"""


_TO_RESULTS = """
() => {
    if (window.innerWidth < 700) document.querySelector("#progress").scrollIntoView({block: "start"});
    return [];
}
"""
"""On a narrow page the images are below the fields."""


class DrawTab:
    """The tab's components, and what happens between them."""

    def __init__(self, studio: Studio, shelf: Shelf):
        self.studio, self.shelf = studio, shelf
        self.drawings, self.running = Drawings(), Running()
        self.uploads, self.drawn = gr.State([]), gr.State(None)  # keys of a client's uploads, and of its last drawing
        self.number = gr.State(0)  # of the image that is looked into
        self.pressed = gr.Number(visible=False)  # the browser sends along which press it was
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._concept()
                self._fields()
            with gr.Column(scale=3, min_width=300):
                self._results()

    def _concept(self) -> None:
        choices = self.shelf.choices()
        first = choices[0][1] if choices else None
        self.concept = gr.Dropdown(choices, value=first, label="Concept", elem_id="concept", filterable=False)
        with gr.Accordion("Use a concept file of your own", open=False):
            self.file = gr.File(label="Concept file", file_count="single", elem_id="concept-file", height=120)
            with gr.Row():
                self.class_noun = gr.Textbox(
                    label="Class noun", placeholder="dog", info="Of another program's file", max_length=60
                )
                self.trigger = gr.Textbox(label="Trigger word", info="Where no token was learned", max_length=60)
            self.add = gr.Button("Add this file", size="sm")
            self.said = gr.HTML(elem_id="concept-said")

    def _fields(self) -> None:
        model, _ = self.studio.base()
        options, dual = sampling_options(model), dual_branch(model)
        first = self.concept.value
        prompt = self._example(first) if first else ""
        self.prompt = gr.Textbox(prompt, label="Prompt", info="V* stands for the concept", lines=2, elem_id="prompt")
        self.read = gr.HTML(self._reading(first, prompt, ""), elem_id="reading")
        with gr.Row():
            self.press = gr.Button("Draw", variant="primary", elem_id="draw")
            self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel")
        time, weight = "Share of the timesteps with both branches", "Weight of the auxiliary branch"
        self.agg_time = gr.Slider(0, 1, dual.agg_time, step=0.05, label="T_a", info=time, buttons=[])
        self.agg_lambda = gr.Slider(-2, 2, dual.agg_lambda, step=0.1, label="Lambda", info=weight, buttons=[])
        self.noun = gr.Textbox("", label="Auxiliary noun", info="Empty: the class noun", max_length=100)
        with gr.Row():
            self.steps = gr.Slider(1, MOST_STEPS, options.steps, step=1, label="Steps", buttons=[], min_width=120)
            self.scale = gr.Slider(1, 15, options.scale, step=0.5, label="Guidance", buttons=[], min_width=120)
        with gr.Row():
            self.solver = gr.Dropdown(list(SOLVERS), value=options.solver, label="Solver", filterable=False, min_width=120)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=120)
        self.n = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images", buttons=[])

    def _results(self) -> None:
        self.progress = gr.HTML(markup.note("Press Draw: both images start from the same noise."), elem_id="progress")
        self.images = gr.HTML("", js_on_load=PICK, elem_id="images")
        with gr.Column(visible=False, elem_id="inside") as self.viewer:
            gr.HTML("<h2>Inside this image</h2>")
            with gr.Row():
                self.step = gr.Slider(1, 50, 1, step=1, label="Step", buttons=[])
                self.layer = gr.Slider(0, 1, 0, step=1, label="Layer", buttons=[])
            self.seen = gr.HTML("", elem_id="seen")
        with gr.Accordion("The same from a terminal and from Python", open=False, visible=False) as self.how:
            self.command = _to_copy("Command for the DCI images", "command")
            self.plain = _to_copy("Command for the plain images", "command-plain")
            self.python = _to_copy("Python for both", "python")

    @property
    def fields(self) -> list[Any]:
        """The components that `Wanted.of` reads."""
        return [
            self.prompt,
            self.agg_time,
            self.agg_lambda,
            self.noun,
            self.scale,
            self.steps,
            self.solver,
            self.seed,
            self.n,
        ]

    def connect(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        asked = [self.concept, self.prompt, self.noun]
        for component in (self.prompt, self.noun):
            component.change(self._reading, asked, self.read, **at_once(trigger_mode="always_last"))
        self.concept.change(self._choose, asked, [self.prompt, self.read], **at_once())
        self.add.click(
            self._add,
            [self.file, self.class_noun, self.trigger, self.uploads, self.prompt],
            [self.uploads, self.concept, self.said, self.prompt, self.read],
            **private(concurrency_id="files", concurrency_limit=2),
        )
        outputs = [self.progress, self.images, self.viewer, self.how, self.command, self.plain, self.python, self.drawn]
        outputs += [self.press, self.cancel]
        waiting = [self.pressed, self.progress, self.cancel]
        event = self.press.click(lambda: waits(self.running), outputs=waiting, js=_TO_RESULTS, **at_once())
        event.then(
            self._draw,
            [self.pressed, self.concept, self.drawn, *self.fields],
            outputs,
            **private(concurrency_id="sampling", concurrency_limit=1, trigger_mode="multiple"),
        )
        self.cancel.click(self._cancel, outputs=[self.progress, self.press, self.cancel], **at_once())
        looking = [self.drawn, self.number, self.step, self.layer]
        self.images.select(self._pick, self.drawn, [self.number, self.viewer, self.step, self.layer, self.seen], **at_once())
        for slider in (self.step, self.layer):
            slider.input(self._look, looking, self.seen, **at_once(trigger_mode="always_last"))
        blocks.load(self._refresh, [self.uploads, self.concept], self.concept, **at_once())
        blocks.unload(self._leave)

    @property
    def chosen(self) -> list[Any]:
        """The components that `choose` updates."""
        return [self.concept, self.prompt, self.read]

    def choose(self, key: str) -> list[Any]:
        """Show a concept as chosen, with an example of a prompt."""
        prompt = self._example(key)
        return [gr.update(choices=self.shelf.choices(), value=key), prompt, self._reading(key, prompt, "")]

    def _refresh(self, uploads: list[str], chosen: str | None) -> Any:
        """The list as it is now: runs may have finished since."""
        choices = self.shelf.choices(*uploads)
        keys = [key for _, key in choices]
        return gr.update(choices=choices, value=chosen if chosen in keys else next(iter(keys), None))

    def _example(self, key: str) -> str:
        try:
            names = self.shelf.names(key)
        except UserError:
            return ""
        marks = ["V*"] if len(names) == 1 else [f"V{i + 1}*" for i in range(len(names))]
        return " and ".join(f"a {mark} {name.class_noun}" for mark, name in zip(marks, names, strict=True)) + " on the beach"

    def _reading(self, key: str | None, prompt: str, noun: str) -> str:
        try:
            return reading(prompt, self.shelf.names(key), noun.strip())
        except UserError as error:
            return markup.error(str(error))

    def _choose(self, key: str, prompt: str, noun: str) -> tuple[Any, str]:
        """A prompt that does not go with the concept is put in the place of the last one's example."""
        read = self._reading(key, prompt, noun)
        nouns = [name.class_noun for name in self.shelf.names(key)] if "dci-error" not in read else []
        if nouns and all(noun in prompt for noun in nouns):
            return gr.skip(), read
        prompt = self._example(key)
        return prompt, self._reading(key, prompt, noun)

    def _add(self, file: str | None, class_noun: str, trigger: str, uploads: list[str], prompt: str) -> tuple:
        unchanged = gr.skip()
        if not file:
            return unchanged, unchanged, markup.error("choose a file first"), unchanged, unchanged
        path = Path(file)
        try:
            entry = self.shelf.add(path, path.name, class_noun.strip() or None, trigger.strip() or None)
        except UserError as error:
            return unchanged, unchanged, markup.error(str(error)), unchanged, unchanged
        uploads = [entry.key, *uploads][:20]
        prompt = self._example(entry.key)
        return (
            uploads,
            gr.update(choices=self.shelf.choices(*uploads), value=entry.key),
            markup.note(f"{entry.label} is chosen."),
            prompt,
            self._reading(entry.key, prompt, ""),
        )

    def _draw(self, request: gr.Request, press: float | None, key: str, before: str | None, *fields: Any) -> Iterator[tuple]:
        stopped = self.running.given_up(request.session_hash, press)
        if stopped():  # while it waited
            yield (gr.skip(),) * 10
            return
        try:
            wanted = Wanted.of(*fields)
            entry = self.shelf.find(key)
            ready = self.studio.use(f"{entry.file} {self.shelf.stamp(entry)}", self.shelf.load(entry))
            for drawing in draw(ready, entry, wanted, stopped):
                if not drawing.finished:
                    yield self._partly(drawing)
                    continue
                kept = self.drawings.keep(drawing, before)
                weights, maps = self.studio.weights, not watched_alike(ready)
                texts = [command(wanted, entry, weights, True, maps), command(wanted, entry, weights, False)]
                shown = gr.update(visible=True)
                words = markup.note("Select an image to look inside it.")
                yield (words, gallery(drawing), gr.skip(), shown, *texts, python(wanted, entry, weights), kept, *_idle())
                return
            yield (markup.note("Cancelled."), *[gr.skip()] * 7, *_idle())
        except UserError as error:
            yield (markup.error(str(error)), *[gr.skip()] * 7, *_idle())
        except (OSError, RuntimeError, ValueError, MemoryError) as error:  # a full disk, a device without memory
            yield (markup.error(failed(error)), *[gr.skip()] * 7, *_idle())

    def _partly(self, drawing: Drawing) -> tuple:
        bar = markup.progress(drawing.done, drawing.calls, f"Step {drawing.done // 2} of {drawing.calls // 2}")
        hidden = gr.update(visible=False)
        return bar, gallery(drawing), hidden, *[gr.skip()] * 5, gr.update(interactive=False), gr.update(interactive=True)

    def _cancel(self, request: gr.Request) -> tuple:
        self.running.stop(str(request.session_hash))
        return markup.note("Cancelled."), *_idle()

    def _leave(self, request: gr.Request) -> None:
        self.running.stop(str(request.session_hash))

    def _pick(self, key: str | None, event: gr.EventData) -> tuple:
        drawing = self.drawings.get(key)
        number = getattr(event, "number", None)
        if drawing is None or not drawing.finished or not isinstance(number, int):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), markup.error("this drawing is forgotten: draw again")
        there = inside.ranges(drawing)
        step = max(1, there.dual_steps // 2)
        layers = max(there.layers - 1, 0)
        return (
            number,
            gr.update(visible=True),
            gr.update(maximum=there.steps, value=step),
            gr.update(maximum=max(layers, 1), value=layers, interactive=layers > 0),
            self._look(key, number, step, layers),
        )

    def _look(self, key: str | None, number: int, step: int, layer: int) -> str:
        drawing = self.drawings.get(key)
        try:
            if drawing is None:
                raise UserError("this drawing is forgotten: draw again")
            return inside.look(drawing, number, int(step), int(layer))
        except UserError as error:
            return markup.error(str(error))


def waits(running: Running) -> tuple[int, str, Any]:
    """What the page shows until a client's turn comes: that it waits, and can cancel."""
    text = "Waiting for its turn; one client samples at a time, and few may wait."
    return running.press(), markup.note(text), gr.update(interactive=True)


def failed(error: BaseException) -> str:
    """Return an unexpected error, which no user can mend, as one line."""
    return f"sampling failed: {next(iter(str(error).splitlines()), '') or type(error).__name__}"


def gallery(drawing: Drawing) -> str:
    """Return both sides' images as HTML: predictions while they are sampled, then buttons and downloads."""
    sections = []
    for name in drawing.sides:
        title, hint = TITLES[name]
        cells = "".join(_cell(drawing, name, number) for number in range(drawing.wanted.n))
        sections.append(
            f'<section><h2>{title}</h2><p class="dci-note">{hint}</p><div class="dci-images">{cells}</div></section>'
        )
    return f'<div class="dci-pair">{"".join(sections)}</div>'


def _cell(drawing: Drawing, name: str, number: int) -> str:
    side, wanted = drawing.sides[name], drawing.wanted
    title = TITLES[name][0]
    if not side.images:
        return '<div class="dci-waiting" aria-hidden="true"></div>'
    text = escape(f"{title} image {number + 1} of '{wanted.prompt}'")
    image = f'<img src="{markup.image_url(side.images[number], lossless=drawing.finished)}" alt="{text}">'
    if not drawing.finished:
        return f"<figure>{image}</figure>"
    file = f"{name}-seed{wanted.seed}-{number:05}.png"
    url = markup.data_url(side.files[number], "image/png")
    look = (
        f'<button type="button" data-number="{number}" aria-label="Look inside {title} image {number + 1}">{image}</button>'
    )
    return f'<figure>{look}<a href="{url}" download="{file}">Download PNG</a></figure>'


def _to_copy(label: str, elem_id: str) -> gr.Textbox:
    """Text to be taken along."""
    return gr.Textbox(label=label, elem_id=elem_id, lines=3, max_lines=8, interactive=False, buttons=["copy"])


def _idle() -> tuple:
    """Draw can be pressed, Cancel cannot."""
    return gr.update(interactive=True), gr.update(interactive=False)
