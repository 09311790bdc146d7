"""One press of Draw: the images of the printed commands, side by side, and what is inside them."""

import shlex

import numpy as np
import pytest
from helpers import ROOT, mostly_slow, run_main

from dci.app import inside
from dci.app.drawing import Drawings, draw
from dci.app.grid import sample_grid, values
from dci.app.reading import reading
from dci.app.studio import Studio, Weights
from dci.app.wanted import Wanted, command, python
from ldm.errors import UserError

PROMPT = "a V* cat in the snow"


def wanted(agg_time=0.5, n=2, steps=4, noun="kitten"):
    return Wanted.of(PROMPT, agg_time, 1.0, noun, 3, steps, "ddim", 5, n)


def arguments(line):
    """The arguments of a printed command, whichever way the program is started."""
    words = shlex.split(line)
    return words[words.index("--concept") :]


@pytest.fixture(scope="module")
def entry(studio, concept_file):
    from dci.app.shelf import Shelf

    return Shelf(studio.read, [], concept_file.parent.parent).find("run:2026-01-01T00-00-00_cat")


@pytest.fixture(scope="module")
def ready(studio, entry):
    return studio.use("cat", studio.read(entry.file))


@pytest.fixture(scope="module")
def drawn(ready, entry):
    """Everything that a press of Draw gave, the last of it finished."""
    return list(draw(ready, entry, wanted()))[-1]


@pytest.mark.parametrize("side", mostly_slow(["dci", "plain"], "dci"))
def test_the_files_are_those_of_the_printed_command_byte_for_byte(drawn, entry, side, tmp_path, monkeypatch):
    line = command(wanted(), entry, Weights(), dci=side == "dci")
    monkeypatch.chdir(ROOT)
    run_main("sample_dci.py", *arguments(line), "--outdir", tmp_path)
    written = [file.read_bytes() for file in sorted((tmp_path / "samples").glob("*.png"))]
    assert written == drawn.sides[side].files and len(written) == 2


@pytest.mark.slow
def test_the_images_are_those_of_the_printed_python(drawn, entry):
    names = {}
    exec(python(wanted(), entry, Weights()), names)
    assert [image.tobytes() for image in names["images"]] == [image.tobytes() for image in drawn.sides["dci"].images]
    assert [image.tobytes() for image in names["plain"]] == [image.tobytes() for image in drawn.sides["plain"].images]


def test_both_sides_start_from_the_same_noise(ready, entry, drawn):
    *_, alone = draw(ready, entry, wanted(agg_time=0, n=1, steps=2))
    plain, dci = (alone.sides[side].images[0] for side in ("plain", "dci"))
    assert plain.tobytes() == dci.tobytes()
    assert drawn.sides["plain"].images[0].tobytes() != drawn.sides["dci"].images[0].tobytes()


def test_it_stops_between_two_steps(ready, entry):
    asked = []

    def stopped():
        asked.append(len(asked))
        return len(asked) > 2

    given = list(draw(ready, entry, wanted(n=1), stopped))
    assert len(asked) == 3 and not any(drawing.finished for drawing in given)


def test_inside_an_image_are_weights_and_predictions(drawn):
    there = inside.ranges(drawn)
    assert (there.steps, there.dual_steps) == (4, 2) and there.layers == len(drawn.sides["dci"].maps.layers)
    html = inside.look(drawn, 1, 1, there.layers - 1)
    assert html.count("<img") == 4 and "Branch weights" in html
    late = inside.look(drawn, 1, 4, 0)
    assert late.count("<img") == 2 and "runs alone after step 2" in late
    with pytest.raises(UserError):
        inside.look(drawn, 2, 1, 0)


def test_a_map_is_dark_where_the_auxiliary_branch_decides(drawn):
    image = drawn.sides["dci"].images[0]
    heat = np.asarray(inside.heat_over(image, np.array([[0.0, 1.0]]), 0.0, 1.0)).astype(int).sum(-1)
    half = image.width // 2
    assert heat[:, :half].max() < heat[:, half:].min()


def test_drawings_are_forgotten_the_oldest_first(drawn):
    kept = Drawings(most=2)
    first = kept.keep(drawn)
    second = kept.keep(drawn, instead_of=first)
    assert kept.get(first) is None and kept.get(second) is drawn
    keys = [kept.keep(drawn) for _ in range(5)]
    assert len(kept) == 2 and kept.get(keys[-1]) is drawn and kept.get("no") is None and kept.get(None) is None


def test_another_concept_takes_the_place_of_the_first_and_leaves_no_trace(concept_file):
    studio = Studio(Weights())
    model, _ = studio.base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    concept = studio.read(concept_file)
    first = studio.use("a", concept)
    assert studio.use("a", concept) is first
    studio.use("b", concept)
    studio._take_off()
    after = model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.slow
def test_a_grid_has_the_images_of_its_settings(ready, entry, drawn):
    *_, grid = sample_grid(ready, wanted(n=1), [0.5], [0.0, 1.0])
    assert grid.finished and len(grid.images) == 2
    *_, same = draw(ready, entry, wanted(n=1))
    assert grid.images[0.5, 1.0].tobytes() == same.sides["dci"].images[0].tobytes()
    assert grid.plain.tobytes() == same.sides["plain"].images[0].tobytes()
    assert grid.sheet().width > 2 * grid.plain.width


@pytest.mark.parametrize("text", ["", "a", "1,2", "0,.1,.2,.3,.4,.5", "nan", "-0.1"])
def test_an_axis_that_cannot_be_sampled_is_refused(text):
    with pytest.raises(UserError):
        values(text, "T_a", 0, 1)


def test_an_axis_rises_without_repeats():
    assert values("0.3; 0.1, 0.3", "T_a", 0, 1) == [0.1, 0.3]


def test_the_reading_marks_the_words_that_count(shelf):
    names = shelf.names("run:2026-01-01T00-00-00_cat")
    html = reading("a V* cat in the snow", names, "kitten")
    assert [word.split("</mark>")[0] for word in html.split("<mark>")[1:]] == [
        "&lt;new1&gt;",
        "&lt;new2&gt;",
        "cat",
        "kitten",
    ]
    assert "3 of 7 tokens" in html and "1 of 5" in html
    assert "does not name the concept" in reading("a dog", names, None)
    assert "<script>" not in reading("V* <script>alert(1)</script>", names, None)
    assert "<script>" not in reading("<script>alert(1)</script>", names, None)


def test_gradio_is_the_page_and_nothing_that_works_behind_it():
    importing = {file.stem for file in (ROOT / "dci/app").glob("*.py") if "import gradio" in file.read_text()}
    assert importing == {"page", "draw_tab", "learn_tab", "compare_tab"}
