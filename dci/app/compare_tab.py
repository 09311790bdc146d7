"""The Compare tab: one prompt and seed under many settings."""

import functools
import io
from collections.abc import Iterator
from typing import Any

import gradio as gr

from dci.app import markup
from dci.app.draw_tab import failed, waits
from dci.app.events import at_once, private
from dci.app.grid import Grid, PlaneEncoders, plane, sample_grid, values
from dci.app.running import Running
from dci.app.shelf import Shelf
from dci.app.studio import Studio
from dci.app.wanted import Wanted
from dci.dual_branch.options import sampling_options
from ldm.errors import UserError


class CompareTab:
    """The tab's components, and what happens between them.

    Args:
        encoders: names of the encoders of CLIP-T and DINO-I.
    """

    def __init__(self, studio: Studio, shelf: Shelf, encoders: tuple[str, str]):
        self.studio, self.shelf, self.running = studio, shelf, Running()
        self.encoders = functools.lru_cache(maxsize=1)(
            lambda model: PlaneEncoders.load(encoders, model, studio.weights.device)
        )
        self.pressed = gr.Number(visible=False)  # the browser sends along which press it was
        choices = shelf.choices()
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                first = choices[0][1] if choices else None
                self.concept = gr.Dropdown(choices, value=first, label="Concept", elem_id="compared", filterable=False)
                self.prompt = gr.Textbox("a V* on the beach", label="Prompt", info="V* stands for the concept", lines=2)
                self.times = gr.Textbox("0.1, 0.3, 0.5", label="T_a", info="Rows of the sheet", max_length=60)
                self.lambdas = gr.Textbox("-1, 0, 1", label="Lambda", info="Columns of the sheet", max_length=60)
                with gr.Row():
                    self.steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=120, buttons=[])
                    self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=120)
                with gr.Row():
                    self.press = gr.Button("Compare", variant="primary", elem_id="compare")
                    self.cancel = gr.Button("Cancel", interactive=False, elem_id="cancel-compare")
            with gr.Column(scale=3, min_width=300):
                self.progress = gr.HTML(markup.note("One image for each T_a and lambda, from the same noise."))
                self.sheet = gr.HTML("", elem_id="sheet")
                self.plane = gr.HTML("", elem_id="plane")

    def connect(self, blocks: gr.Blocks) -> None:
        """Connect the events."""
        outputs = [self.progress, self.sheet, self.plane, self.press, self.cancel]
        inputs = [self.pressed, self.concept, self.prompt, self.times, self.lambdas, self.steps, self.seed]
        waiting = [self.pressed, self.progress, self.cancel]
        event = self.press.click(lambda: waits(self.running), outputs=waiting, **at_once())
        queue = {"concurrency_id": "sampling", "concurrency_limit": 1, "trigger_mode": "multiple"}
        event.then(self._compare, inputs, outputs, **private(**queue))
        stopping = [self.progress, self.press, self.cancel]
        self.cancel.click(self._cancel, outputs=stopping, **at_once())
        blocks.load(self._refresh, self.concept, self.concept, **at_once())
        blocks.unload(self._leave)

    def _compare(
        self,
        request: gr.Request,
        press: float | None,
        key: str,
        prompt: str,
        times: str,
        lambdas: str,
        steps: Any,
        seed: Any,
    ) -> Iterator[tuple]:
        stopped = self.running.given_up(request.session_hash, press)
        if stopped():  # while it waited
            yield (gr.skip(),) * 5
            return
        idle = gr.update(interactive=True), gr.update(interactive=False)
        try:
            axes = values(times, "T_a", 0, 1), values(lambdas, "lambda", -5, 5)
            model, _ = self.studio.base()
            usual = sampling_options(model)
            wanted = Wanted.of(prompt, 0, 0, "", usual.scale, steps, usual.solver, seed, 1)
            entry = self.shelf.find(key)
            ready = self.studio.use(f"{entry.file} {self.shelf.stamp(entry)}", self.shelf.load(entry))
            grid = None
            for grid in sample_grid(ready, wanted, *axes, stopped):
                bar = markup.progress(grid.done, grid.calls, f"{len(grid.images)} of {len(axes[0]) * len(axes[1])} images")
                yield bar, show(grid), "", gr.update(interactive=False), gr.update(interactive=True)
            if grid is None or not grid.finished:
                yield markup.note("Cancelled."), gr.skip(), "", *idle
                return
            yield (
                markup.note(f"Seed {wanted.seed}, {wanted.steps} steps."),
                show(grid),
                self._plane(grid, wanted, ready),
                *idle,
            )
        except UserError as error:
            yield markup.error(str(error)), gr.skip(), "", *idle
        except (OSError, RuntimeError, ValueError, MemoryError) as error:  # a full disk, a device without memory
            yield markup.error(failed(error)), gr.skip(), "", *idle

    def _plane(self, grid: Grid, wanted: Wanted, ready: Any) -> str:
        try:
            svg = plane(grid, wanted, ready, self.encoders(ready.pipeline.model.config.name))
        except UserError as error:
            return markup.note(str(error))
        words = "Up: more like the concept. Right: more like the prompt. Numbers beside points are lambda."
        return f"<h2>Fidelity and editability</h2>{markup.note(words)}{svg}"

    def _cancel(self, request: gr.Request) -> tuple:
        self.running.stop(str(request.session_hash))
        return markup.note("Cancelled."), gr.update(interactive=True), gr.update(interactive=False)

    def _leave(self, request: gr.Request) -> None:
        self.running.stop(str(request.session_hash))

    def _refresh(self, chosen: str | None) -> Any:
        choices = self.shelf.choices()
        keys = [key for _, key in choices]
        return gr.update(choices=choices, value=chosen if chosen in keys else next(iter(keys), None))


def show(grid: Grid) -> str:
    """Return a grid as an HTML table, and as one PNG to download once it is whole."""
    head = "".join(f'<th scope="col">{value:g}</th>' for value in grid.lambdas)
    rows = []
    for time in grid.times:
        cells = "".join(f"<td>{_image(grid, time, value)}</td>" for value in grid.lambdas)
        rows.append(f'<tr><th scope="row">{time:g}</th>{cells}</tr>')
    plain = markup.figure(grid.plain, "Plain sampling", caption="Plain") if grid.plain else '<div class="dci-waiting"></div>'
    table = (
        f'<table class="dci-grid"><caption>T_a down, lambda across</caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return f'<div class="dci-compare"><div class="dci-alone">{plain}</div>{table}</div>{_download(grid)}'


def _image(grid: Grid, time: float, value: float) -> str:
    image = grid.images.get((time, value))
    if image is None:
        return '<div class="dci-waiting"></div>'
    return f'<img src="{markup.image_url(image)}" alt="T_a {time:g}, lambda {value:g}">'


def _download(grid: Grid) -> str:
    if not grid.finished:
        return ""
    content = io.BytesIO()
    grid.sheet().save(content, "PNG")
    return f'<a download="compare.png" href="{markup.data_url(content.getvalue(), "image/png")}">Download the sheet</a>'
