"""The page: three tabs, one look."""

from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr

from dci.app.compare_tab import CompareTab
from dci.app.draw_tab import DrawTab
from dci.app.jobs import Jobs
from dci.app.learn_tab import LearnTab
from dci.app.settings import Settings
from dci.app.shelf import Shelf
from dci.app.studio import Studio

STATIC = Path(__file__).with_name("static")
_SYSTEM = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]


class Page:
    """Everything behind the page, and the page itself as Gradio's `blocks`."""

    def __init__(self, settings: Settings, uploads: Path):
        self.settings, self.uploads = settings, uploads
        self.studio = Studio(settings.weights)
        self.shelf = Shelf(self.studio.read, settings.concepts, settings.logdir)
        self.jobs = Jobs(settings.logdir, uploads)
        self.studio.base()  # report what cannot be loaded before anybody opens the page
        self.blocks = self._build()

    @cached_property
    def look(self) -> dict[str, Any]:
        """The page's looks, as arguments of `launch`. The fonts are the system's."""
        theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="md", font=_SYSTEM, font_mono=_MONO)
        theme = theme.set(
            body_text_color_subdued="*neutral_600",
            body_text_color_subdued_dark="*neutral_300",
            block_info_text_color="*neutral_600",
            block_info_text_color_dark="*neutral_300",
            block_label_text_color="*neutral_700",
            block_label_text_color_dark="*neutral_200",
            block_title_text_color="*neutral_700",
            block_title_text_color_dark="*neutral_200",
            input_placeholder_color="*neutral_600",
            input_placeholder_color_dark="*neutral_300",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            button_primary_text_color="white",
        )
        return {"theme": theme, "css_paths": [STATIC / "page.css"], "js": (STATIC / "page.js").read_text(encoding="utf-8")}

    def close(self) -> None:
        """End what runs behind the page."""
        self.jobs.close()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="ICO + DCI", analytics_enabled=False, fill_width=False) as blocks:
            gr.HTML(
                "<h1>ICO + DCI</h1><p>Your concept, in any image. Two branches run in the first steps, "
                "one for the concept and one for everything else; this page shows both.</p>",
                elem_classes="dci-head",
            )
            with gr.Tabs() as tabs:
                with gr.Tab("Draw", id="draw"):
                    draw = DrawTab(self.studio, self.shelf)
                with gr.Tab("Learn", id="learn"):
                    learn = LearnTab(self.studio, self.jobs, self.uploads)
                with gr.Tab("Compare", id="compare"):
                    compare = CompareTab(self.studio, self.shelf, (self.settings.clip, self.settings.instance))
            draw.connect(blocks)
            learn.connect(blocks, lambda key: [gr.Tabs(selected="draw"), *draw.choose(key)], [tabs, *draw.chosen])
            compare.connect(blocks)
        return blocks
