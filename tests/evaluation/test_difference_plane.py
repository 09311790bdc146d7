"""The plot of paired differences, and the program that makes it from reports."""

import dataclasses

import pytest
from helpers import ROOT, pixels, refused, run_here, run_main

from dci.evaluation.difference_plane import difference_plane
from dci.evaluation.report import write_report
from dci.evaluation.scores import ImageScore, RunScores, Scores, summarize
from ldm.errors import UserError


def scores(editability, fidelity, concepts=("cat", "dog")):
    """Scores whose differences from `scores(0, 0)` are those two for the first concept, and twice as much for the second."""
    rows = tuple(
        ImageScore(
            str(ROOT / "data/concepts/cat/00.png"),
            f"p{p}",
            "",
            f"0:{s}",
            {"clip_t": 0.1 * p + (1 + c) * editability, "dino_i": 0.2 * s + (1 + c) * fidelity},
            concept,
        )
        for c, concept in enumerate(concepts)
        for p in range(2)
        for s in range(2)
    )
    return Scores(rows, summarize(rows, 99))


RUNS = {
    "cd, plain": scores(0, 0),
    "cd, dci": scores(0.2, -0.02),
    "ico, plain": scores(0.1, 0.3),
    "ico, dci": scores(0.3, 0.2),
}


def drawn(figure):
    """Points with their colour and face, and error bars as (low, high) of each axis."""
    bars = [bar for bar in figure.axes[0].containers if len(bar.lines[0].get_xydata())]  # the others are the legend's
    points = [
        (*line.get_xydata()[0].tolist(), line.get_color(), line.get_markerfacecolor())
        for line, _, _ in (bar.lines for bar in bars)
    ]
    arms = [[part.get_segments()[0].tolist() for part in bar.lines[2]] for bar in bars]
    return points, arms


def test_points_are_mean_differences_and_arms_their_intervals():
    points, arms = drawn(difference_plane(RUNS, "cd, plain"))
    assert [point[:2] for point in points] == [pytest.approx(p) for p in ((0, 0), (0.3, -0.03), (0.15, 0.45), (0.45, 0.3))]
    colours, faces = [point[2] for point in points], [point[3] for point in points]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert faces[::2] == ["white", "white"] and faces[1::2] == colours[1::2]
    # Every image of a concept differs by as much, so an interval is that of two concepts: from the one to the other.
    assert arms[0] == [] and len(arms[1]) == 2
    across, upward = arms[1]
    assert [x for x, _ in across] == pytest.approx([0.2, 0.4]) and [y for _, y in upward] == pytest.approx([-0.04, -0.02])


def test_the_legend_names_methods_once_and_the_settings_that_all_share():
    def texts(runs):
        return [text.get_text() for text in difference_plane(runs, "cd, plain").legends[0].get_texts()]

    assert texts(RUNS) == ["cd", "ico", "plain", "dci"]
    assert texts(RUNS | {"lora, dci": scores(1, 1)}) == ["cd", "ico", "lora", "plain", "dci"]
    assert texts(RUNS | {"ti, a": scores(1, 1), "ti, b": scores(1, 1)}) == ["cd", "ico", "ti"]


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="no row 'cd': expected one of cd, plain; cd, dci"):
        difference_plane(RUNS, "cd")
    rows = tuple(dataclasses.replace(row, values={"clip_t": 0.0}) for row in RUNS["ico, dci"].rows)
    with pytest.raises(UserError, match="'x' and 'cd, plain' have no CLIP-T and DINO-I in common"):
        difference_plane(RUNS | {"x": Scores(rows, {})}, "cd, plain")


def test_the_program_pools_reports_and_leaves_out_what_is_of_some_concepts(tmp_path, capfd):
    write_report(tmp_path / "a", [RunScores(name, run) for name, run in RUNS.items()], "t")
    pigs = {name: scores(*pair, ("pig",)) for name, pair in {"cd, plain": (0, 0), "ico, dci": (1, 1)}.items()}
    write_report(tmp_path / "b", [RunScores(name, run) for name, run in pigs.items()], "t")
    program = ("plot_differences.py", tmp_path / "a", tmp_path / "b", "--less", "cd, plain", "--out")
    run_main(*program, tmp_path / "plane.png")
    printed = capfd.readouterr().out
    assert "Left out, for they are not of all 3 concepts: cd, dci; ico, plain\n" in printed
    assert pixels(tmp_path / "plane.png").shape[1] == pytest.approx(5.2 * 120, abs=1)
    refused(run_here(capfd, *program, tmp_path / "plane.png", "--rows", "nothing"), "no row 'nothing'", "ico, dci")
    refused(run_here(capfd, *program, tmp_path / "plane.txt"), "plane.txt: expected a file's name that ends in .png")
