"""The Learn tab: images dropped, a training started, and how far it is, shown to everybody who opens the page."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from dci.app import markup
from dci.app.events import at_once, private
from dci.app.jobs import FAILED, FINISHED, RUNNING, STOPPED, WAITING, Job, Jobs, as_json, losses, validation_sheet
from dci.app.reference_set import MOST, collect, keep
from dci.app.shelf import inside
from dci.app.studio import Studio
from dci.concept.nouns import checked_noun
from dci.finetuning.config import FinetuneConfig
from dci.finetuning.run_folder import CONFIG_FILE
from ldm import config as configuration
from ldm.errors import UserError
from ldm.images import read_image
from ldm.shipped import find

METHODS = {
    "ICO": "ico",
    "ICO, one context for all images": "ico-shared-context",
    "Custom Diffusion": "custom-diffusion",
    "Textual inversion": "textual-inversion",
}
MOST_STEPS = 5000
_SAID = {
    WAITING: "Waits for the training before it.",
    RUNNING: "Training.",
    STOPPED: "Stopped; a checkpoint is kept, and the run can go on.",
    FINISHED: "Finished: the concept can be drawn.",
}


class LearnTab:
    """The tab's components, and what happens between them."""

    def __init__(self, studio: Studio, jobs: Jobs, scratch: Path):
        self.studio, self.jobs, self.scratch = studio, jobs, scratch
        self.set, self.seen = gr.State(None), gr.State("")  # folder of the dropped images; what the page shows of the queue
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                label = f"Images of one thing, 3 to {MOST}, and masks NAME.mask.png"
                self.files = gr.File(label=label, file_count="multiple", elem_id="images-to-learn", height=160)
                self.masked = gr.Checkbox(False, label="Count the object alone (masks, or transparency)")
                self.noun = gr.Textbox("", label="Class noun", info="The ordinary word for it, such as dog", max_length=60)
                self.method = gr.Dropdown(list(METHODS), value="ICO", label="Method", filterable=False)
                self.steps = gr.Number(self._usual_steps("ICO"), label="Steps", precision=0, minimum=1, maximum=MOST_STEPS)
                with gr.Row():
                    self.start = gr.Button("Learn", variant="primary", elem_id="learn")
                    self.stop = gr.Button("Stop", elem_id="stop")
                self.said = gr.HTML("", elem_id="learn-said")
                with gr.Row():
                    self.run = gr.Dropdown([], label="Unfinished run", filterable=False, elem_id="unfinished")
                    self.go_on = gr.Button("Go on", elem_id="go-on")
            with gr.Column(scale=3, min_width=300):
                self.squares = gr.HTML(markup.note("Drop images to see them as training will."), elem_id="squares")
                self.status = gr.HTML("", elem_id="training")
                self.use = gr.Button("Draw with it", visible=False, elem_id="use")
                with gr.Accordion("The same from a terminal", open=False):
                    self.command = gr.Textbox(
                        label="Command for this training", lines=3, interactive=False, buttons=["copy"]
                    )
        self.timer = gr.Timer(1.0)

    def connect(self, blocks: gr.Blocks, chosen: Callable[[str], list], outputs: list[Any]) -> None:
        """Connect the events.

        Args:
            chosen: key of a run -> updates of `outputs`, which show the Draw tab with that concept.
        """
        dropped, squares = [self.files, self.masked], [self.squares, self.set]
        for event in (self.files.change, self.masked.change):
            event(self._dropped, dropped, squares, **private(concurrency_id="files", concurrency_limit=2))
        self.method.change(self._usual_steps, self.method, self.steps, **at_once())
        fields = [self.set, self.noun, self.method, self.steps, self.masked]
        self.start.click(self._start, fields, self.said, **private(concurrency_id="files", concurrency_limit=2))
        self.stop.click(self._stop, outputs=self.said, **at_once())
        self.go_on.click(self._go_on, self.run, self.said, **at_once())
        shown = [self.status, self.seen, self.stop, self.use, self.command, self.run]
        self.timer.tick(self._watch, self.seen, shown, **at_once())
        blocks.load(lambda: self._watch(""), outputs=shown, **at_once())
        self.use.click(lambda: chosen(self._finished_key()), outputs=outputs, **at_once())

    def _config(self, method: str) -> str:
        """The training configuration of a method for the family of the model that is loaded."""
        if method not in METHODS:
            raise UserError(f"method '{method}': expected one of {', '.join(METHODS)}")
        model, _ = self.studio.base()
        family = "sdxl" if model.config.unet.adm_in_channels else "sd-v1"
        for name in (model.config.name, family, "sd-v1"):
            path = f"configs/train/{METHODS[method]}-{name}.yaml"
            if find(path).is_file():
                return path
        raise UserError(f"there is no configuration of {method} for the model '{model.config.name}'")

    def _usual_steps(self, method: str) -> int:
        try:
            return int(configuration.read_yaml(find(self._config(method)))["training"]["steps"])
        except (UserError, KeyError):
            return 900

    def _dropped(self, files: list[str] | None, masked: bool) -> tuple[str, str | None]:
        if not files:
            return markup.note("Drop images to see them as training will."), None
        try:
            model, _ = self.studio.base()
            references = collect(files, model.config.image_size, masked, self.scratch)
        except UserError as error:
            return markup.error(str(error)), None
        return references.show(), str(references.folder)

    def _start(self, folder: str | None, noun: str, method: str, steps: Any, masked: bool) -> str:
        try:
            if not folder or not Path(folder).is_dir():
                raise UserError(f"drop 3 to {MOST} images first")
            noun = _plain_noun(noun)
            if not isinstance(steps, (int, float)) or not 1 <= steps <= MOST_STEPS:
                raise UserError(f"steps {steps}: expected 1 to {MOST_STEPS}")
            name = re.sub(r"\W+", "-", f"{METHODS.get(method)}-{noun}".lower())
            config = self._config(method)
            images = keep(Path(folder), self.jobs.logdir, name)
            words = [*self._words(config, name), *_overrides(_here(images), noun, int(steps), masked)]
            self.jobs.submit(words, name, int(steps))
        except UserError as error:
            return markup.error(str(error))
        return markup.note("It is in the queue; the page may be closed.")

    def _words(self, config: str | None, name: str | None) -> list[str]:
        weights = self.studio.weights
        given = {"config": config, "name": name, "logdir": _here(self.jobs.logdir), "model": weights.model}
        given |= {"checkpoint": weights.checkpoint, "vae": weights.vae, "device": weights.device}
        return [word for option, value in given.items() if value for word in (f"--{option}", str(value))]

    def _go_on(self, name: str | None) -> str:
        try:
            folder = next((run for run in self.jobs.resumable() if run.name == name), None)
            if folder is None:
                raise UserError("choose an unfinished run first")
            config = configuration.load(FinetuneConfig, folder / CONFIG_FILE)
            words = ["--resume", _here(folder), "--logdir", _here(self.jobs.logdir), "--device", self.studio.weights.device]
            self.jobs.submit(words, config.name, config.training.steps, folder)
        except UserError as error:
            return markup.error(str(error))
        return markup.note(f"{folder.name} goes on.")

    def _stop(self) -> str:
        self.jobs.stop()
        return markup.note("Stopping after this step; a checkpoint is written.")

    def _watch(self, seen: str) -> tuple:
        """What there is to see of the queue; nothing is sent where that is what the page shows already."""
        now = as_json(self.jobs)
        if now == seen:
            return tuple(gr.skip() for _ in range(6))
        job = self.jobs.current()
        runs = [run.name for run in self.jobs.resumable()]
        busy = job is not None and job.state in (RUNNING, WAITING)
        return (
            self._status(job) if job else "",
            now,
            gr.update(interactive=busy),
            gr.update(visible=job is not None and job.state == FINISHED),
            job.command if job else "",
            gr.update(choices=runs, value=next(iter(runs), None)),
        )

    def _status(self, job: Job) -> str:
        """A training as HTML: how far it is, its loss, its newest validation images."""
        rows = losses(job)
        done = job.steps if job.state == FINISHED else rows[-1][0] if rows else 0
        parts = [f"<h2>{job.folder.name if job.folder else job.name}</h2>"]
        parts.append(markup.error(job.message) if job.state == FAILED else markup.note(_SAID[job.state]))
        parts.append(markup.progress(done, job.steps, f"Step {done} of {job.steps}"))
        if self.jobs.waiting() and job.state == RUNNING:
            parts.append(markup.note(f"Waiting behind it: {self.jobs.waiting()}"))
        if rows:
            parts += ["<h3>Loss</h3>", markup.curve(rows, job.steps, "Loss")]
        sheet = validation_sheet(job)
        if sheet is not None and inside(sheet, self.jobs.logdir):
            step = int(sheet.stem.removeprefix("step-"))
            image = read_image(sheet)
            parts += [
                f"<h3>Validation images at step {step}</h3>",
                markup.figure(image, f"Validation images at step {step}"),
            ]
        return "".join(parts)

    def _finished_key(self) -> str:
        job = self.jobs.current()
        return f"run:{job.folder.name}" if job is not None and job.state == FINISHED and job.folder else ""


def _plain_noun(noun: str) -> str:
    """Return a class noun that is words and nothing else: it becomes part of a command.

    Raises:
        UserError: it is empty, a phrase, or something else.
    """
    noun = checked_noun(str(noun or ""))
    if not re.fullmatch(r"[^\W\d_](?:[^\W_]|[ '-]){0,59}", noun):
        raise UserError(f"the noun '{noun}' is no ordinary word: letters, spaces and hyphens alone, such as dog")
    return noun


def _overrides(images: str, noun: str, steps: int, masked: bool) -> list[str]:
    """Options in place of the configuration's: about a hundred points of the curve, four sheets."""
    options = [f"data.images={images}", f"concept.class_noun={noun}", f"training.steps={steps}"]
    options += ["data.masked_loss=true"] if masked else []
    shown = [f"logging.every={max(1, steps // 100)}", f"validation.every={max(10, steps // 4)}", "validation.n_samples=2"]
    return options + shown


def _here(path: Path) -> str:
    """A path as a command that is started in the current folder would give it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
