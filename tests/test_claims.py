"""What README and docs claim: every number of a marked table is that of its scores.json, and no claim stands outside."""

import itertools
import json
import re

import numpy as np
import pytest
from helpers import ROOT
from scipy.stats import binomtest, bootstrap, spearmanr

from dci.evaluation.bootstrap import bootstrap_mean
from dci.evaluation.claims import fill, rows_of, without_tables
from dci.evaluation.power import concepts_needed, difference_variances, smallest_shown
from dci.evaluation.report import write_report
from dci.evaluation.scores import (
    ImageScore,
    RunScores,
    Scores,
    difference,
    paired_differences,
    read_report,
    read_reports,
    summarize,
)
from dci.experiments.gain_study import gains_of, rank_correlation
from ldm.errors import UserError
from ldm.pretraining.concepts import NOTO_CONCEPTS, STUDY_CONCEPTS

PAGES = [
    file for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "<!-- numbers:" in file.read_text()
]
RESULTS = ROOT / "docs/results-tiny"
EFFECT = r"(?<![\w.])[+−-]\d*\.\d+|\d\.\d ?%|\d pp"
"""A difference or a share as these pages write them."""


def named(page):
    return str(page.relative_to(ROOT))


def test_the_pages_that_report_results_are_marked():
    assert {named(page) for page in PAGES} >= {"README.md", "docs/results-tiny/README.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_numbers_are_those_of_the_stored_scores(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text, ROOT) == text, "run python scripts/fill_claims.py"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_claims_name_rows_and_carry_no_numbers_of_their_own(page):
    text = page.read_text(encoding="utf-8")
    rows, prose = rows_of(text), without_tables(text)
    assert len(rows) == max(rows), "rows are numbered through"
    spans = re.findall(r"\b[Rr]ows? (\d+)(?: (?:and|to) (\d+))?", prose)
    assert spans and all(int(number) in rows for span in spans for number in span if number)
    results = (
        prose[prose.find("\n## Results") :].partition("\n## Where")[0]
        if page.name == "README.md" and page.parent == ROOT
        else prose
    )
    assert not re.findall(EFFECT, re.sub(r"`[^`]*`", "", results))


def scores(shift):
    rows = tuple(
        ImageScore(f"{p}-{s}.png", f"p{p}", "", f"0:{s}", {"dino_i": 0.1 * p + shift, "place": float(p > 1)}, "dog")
        for p in range(4)
        for s in range(2)
    )
    return Scores(rows, summarize(rows, 99))


PAGE = """Text.

<!-- numbers: report/scores.json -->
| | fidelity (DINO-I) | place right | CLIP-T |
|---|---|---|---|
| 1 · `b, x` less `a` | wrong | | |
| 2 · `a` | | | |

Row 1 is better.
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("claims")
    picture = ROOT / "data/concepts/cat/00.png"
    runs = [RunScores("a", scores(0)), RunScores("b, x", scores(0.25))]
    for row in (row for run in runs for row in run.scores.rows):
        object.__setattr__(row, "file", str(picture))
        row.values["clip_t"] = 0.5
    write_report(tmp_path / "report", runs, "t")
    return tmp_path


def test_a_table_is_filled_from_its_report(report):
    text = fill(PAGE, report)
    assert "| 1 · `b, x` less `a` | **+0.250** [+0.250, +0.250] | +0.0 pp [+0.0, +0.0] | +0.000 [+0.000, +0.000] |" in text
    interval = bootstrap_mean([0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3], {"p": list("00112233")}, resamples=99)
    assert f"| 2 · `a` | {interval.mean:.3f} [" in text and "50.0 % [" in text
    assert fill(text, report) == text
    assert fill(text.replace("+0.250, +0.250", "+0.240, +0.250"), report) == text  # a forged interval does not stay
    assert rows_of(text) == {1: "`b, x` less `a`", 2: "`a`"}
    assert "Row 1 is better." in without_tables(text) and "0.250" not in without_tables(text)


def test_a_table_may_compare_rows_of_two_reports(report):
    runs = [run for run in read_report(report / "report") if run.name == "a"]
    write_report(report / "other", [RunScores("c", runs[0].scores)], "t")
    both = PAGE.replace("report/scores.json", "report/scores.json other").replace("2 · `a`", "2 · `b, x` less `c`")
    assert "| 2 · `b, x` less `c` | **+0.250** [+0.250, +0.250] |" in fill(both, report)
    with pytest.raises(UserError, match="has a row 'a' of 'dog', as another of these"):
        fill(PAGE.replace("report/scores.json", "report/scores.json report"), report)


def test_a_row_that_two_reports_have_is_of_the_concepts_of_both(report):
    """Summaries and differences are over all of their images; the other report's run has no partner for this one's dog."""
    runs = read_report(report / "report")
    for run in runs:
        for row in run.scores.rows:
            object.__setattr__(row, "concept", "cat")
            row.values["dino_i"] += 0.5 if run.name == "a" else 0.25
    write_report(report / "cats", runs, "t")
    text = fill(PAGE.replace("report/scores.json", "report/scores.json cats/scores.json"), report)
    assert "| 1 · `b, x` less `a` | +0.125 [+0.000, +0.250] |" in text
    mean = np.mean([0.0, 0.1, 0.2, 0.3]) + 0.25
    assert f"| 2 · `a` | {mean:.3f} [" in text


def test_a_row_may_be_a_difference_of_differences(report):
    row = "2 · `b, x` less `a` beside `a` less `b, x`"
    assert f"| {row} | **+0.500** [+0.500, +0.500] | +0.0 pp" in fill(PAGE.replace("2 · `a`", row), report)
    row = "2 · `b, x` less `a` beside `b, x` less `a`"
    assert f"| {row} | +0.000 [+0.000, +0.000] | +0.0 pp" in fill(PAGE.replace("2 · `a`", row), report)


def test_a_row_may_be_of_some_concepts_or_of_the_images_that_have_their_place(tmp_path):
    picture = str(ROOT / "data/concepts/cat/00.png")

    def run(name, value_of):
        rows = [
            ImageScore(picture, f"p{p}", "", f"0:{s}", {"dino_i": value_of(c, p, s), "place": float(p)}, c)
            for c in ("cat", "dog", "cow")
            for p in range(2)
            for s in range(2)
        ]
        return RunScores(name, Scores(tuple(rows), summarize(rows, 99)))

    gains = {"cat": 0.1, "dog": 0.2, "cow": 0.6}
    runs = [run("a", lambda c, p, s: 0.1 * s), run("b", lambda c, p, s: 0.1 * s + gains[c] * (1 + p))]
    write_report(tmp_path / "report", runs, "t")
    base, text = "`b` less `a`", "<!-- numbers: report/scores.json -->\n| | DINO-I |\n|---|---|\n| 1 · {} | |\n"
    for row, mean in (
        (base, "+0.450"),
        (f"{base} without `cow`", "+0.225"),
        (f"{base} without `cow` and `dog`", "+0.150"),
        (f"{base} where the place is right", "+0.600"),
        (f"{base} where the place is wrong", "+0.300"),
        (f"{base} where the place is wrong without `cow`", "+0.150"),
    ):
        assert f"| 1 · {row} | **{mean}** [" in fill(text.format(row), tmp_path)
    with pytest.raises(UserError, match="no concept 'pig' in the report: it has cat, dog, cow"):
        fill(text.format(f"{base} without `pig`"), tmp_path)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("`a`", "`c`", "no row 'c'"),
        ("(DINO-I)", "(DINO)", r"no metric 'fidelity \(DINO\)'"),
        ("2 · `a`", "2 · a", "names no row"),
        ("report/scores.json", "none/scores.json", "no file .*none/scores.json"),
    ],
)
def test_tables_that_name_what_is_not_there(report, before, after, message):
    with pytest.raises(UserError, match=message):
        fill(PAGE.replace(before, after), report)


@pytest.mark.slow
def test_what_could_have_been_shown_is_what_the_page_says():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    runs = read_reports([RESULTS, RESULTS / "noto", RESULTS / "equal"])
    rows = re.findall(r"^  \| `([^`]+)` less `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for ours, theirs, cells in rows:
        found = {v.metric: v for v in difference_variances(runs[ours], runs[theirs])}
        designs = itertools.product((15, 30), ("clip_t", "dino_i"))
        for (concepts, metric), said in zip(designs, cells.split(" | "), strict=True):
            shown = smallest_shown(found[metric], concepts, repetitions=200, resamples=300)
            assert shown.difference == pytest.approx(float(said), rel=0.1)
    pair = runs["ico, dci"], runs["custom-diffusion, plain"]
    assert "takes some seventy concepts" in text
    found = {v.metric: v for v in difference_variances(*pair)}["clip_t"]
    assert 60 < concepts_needed(found, difference(*pair, resamples=9)["clip_t"].mean, repetitions=100, resamples=300) < 85
    assert "fidelity as small as row" in text and "takes more than 128" in text
    pair = runs["ico, dci"], runs["custom-diffusion-steps=200, plain"]
    found = {v.metric: v for v in difference_variances(*pair)}["dino_i"]
    assert concepts_needed(found, difference(*pair, resamples=9)["dino_i"].mean, repetitions=50, resamples=200) is None


def stated(pattern):
    """The numbers of a statement between backticks on the results page."""
    text = re.sub(r"\s+", " ", (RESULTS / "README.md").read_text(encoding="utf-8")).replace("−", "-")
    return [float(number) for number in re.search(pattern, text).groups()]


NUMBER = r"([+-]?\d+\.\d+)"
MEAN = rf"`{NUMBER} \[{NUMBER}, {NUMBER}\]`"


def equal_gains():
    """ICO's gain in fidelity over Custom Diffusion at equal training: concept -> DINO-I."""
    return json.loads((RESULTS / "distance-equal.json").read_text())["ico, plain"]


def test_the_difference_between_painted_and_plain_drawings_is_as_the_page_says():
    gains, concepts = equal_gains(), STUDY_CONCEPTS | NOTO_CONCEPTS
    painted, drawn = (
        np.array([gain for name, gain in gains.items() if (concepts[name].colours is not None) == paint])
        for paint in (True, False)
    )
    assert (len(painted), len(drawn)) == (5, 25)
    found = bootstrap((painted, drawn), lambda a, b, axis: a.mean(axis) - b.mean(axis), method="percentile", rng=0)
    mean, low, high = stated(f"that are painted over gain {MEAN} more")
    assert mean == pytest.approx(painted.mean() - drawn.mean(), abs=0.005)
    assert (low, high) == pytest.approx((found.confidence_interval.low, found.confidence_interval.high), abs=0.015)
    assert low < 0 < high


def test_how_much_sets_of_drawings_differ_by_chance_is_as_the_page_says():
    gains = np.array(list(equal_gains().values()))
    (spread,) = stated(rf"have a standard deviation of {NUMBER} between drawings")
    assert spread == pytest.approx(gains.std(ddof=1), abs=0.005)
    rng = np.random.default_rng(0)
    order = rng.permuted(np.tile(gains, (20_000, 1)), axis=1)
    eight, six = order[:, :8].mean(axis=1), order[:, 8:14].mean(axis=1)
    shown = stated(rf"sets of eight of them have means from `{NUMBER} to {NUMBER}`, sets of six from `{NUMBER} to {NUMBER}`")
    found = [*np.quantile(eight, (0.025, 0.975)), *np.quantile(six, (0.025, 0.975))]
    assert shown == pytest.approx(found, abs=0.01)
    (first,), (second,) = (stated(rf"`{NUMBER} \[[^]]*\]` over {number}") for number in ("eight concepts", "six drawings"))
    assert np.mean(np.abs(eight - six) >= first - second) == pytest.approx(0.01, abs=0.005)


def test_the_places_that_dci_mends_and_spoils_are_as_many_as_the_page_says():
    text = re.sub(r"\s+", " ", (RESULTS / "README.md").read_text(encoding="utf-8"))
    said = (
        (
            "custom-diffusion",
            4800,
            r"the place in (\d+) of 4,800 images; DCI mends (\d+) of these and spoils (\d+) of",
        ),
        ("ico", 4800, r"ICO misses (\d+) of as many \((\d+) mended, (\d+) spoiled\)"),
        ("textual-inversion", 2400, r"textual inversion (\d+) of 2,400 \((\d+) mended, (\d+) spoiled\)"),
    )
    runs = read_reports([RESULTS, RESULTS / "noto"])
    for method, images, pattern in said:
        plain, dci = (
            {(row.concept, row.prompt, row.noise): row.values["place"] for row in runs[f"{method}, {setting}"].rows}
            for setting in ("plain", "dci")
        )
        assert len(plain) == len(dci) == images
        missed = [key for key, right in plain.items() if not right]
        mended = sum(dci[key] == 1 for key in missed)
        spoiled = sum(dci[key] == 0 for key in plain) - (len(missed) - mended)
        assert re.search(pattern, text).groups() == (str(len(missed)), str(mended), str(spoiled))


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        (("ico, plain", "custom-diffusion-steps=200, plain"), f"a rank correlation of {MEAN}"),
        (("ico-steps=100, plain", "custom-diffusion, plain"), f"with 100 steps for both it is {MEAN}"),
        (("ico, plain", "custom-diffusion, plain"), f"the trainings that the rule chose {MEAN}"),
    ],
)
def test_the_gain_in_fidelity_and_the_distance_from_the_base_are_as_the_page_says(rows, pattern):
    distances = json.loads((RESULTS / "distance.json").read_text())["distance"]
    runs = read_reports([RESULTS, RESULTS / "noto", RESULTS / "equal"])
    found = gains_of(*(runs[row] for row in rows))
    correlation = rank_correlation(distances, found)
    means = {concept: np.mean(list(values.values())) for concept, values in found.items()}
    assert correlation.n == 30
    assert correlation.mean == pytest.approx(
        spearmanr([distances[concept] for concept in means], list(means.values())).statistic
    )
    assert stated(pattern) == pytest.approx([correlation.mean, correlation.low, correlation.high], abs=0.005)


@pytest.mark.parametrize(
    ("file", "method", "rows"),
    [
        ("distance.json", "ico", ("ico, plain", "custom-diffusion, plain")),
        ("distance-equal.json", "ico, plain", ("ico, plain", "custom-diffusion-steps=200, plain")),
    ],
)
def test_the_stored_gains_are_those_of_the_reports(file, method, rows):
    gains = json.loads((RESULTS / file).read_text())[method]
    runs = read_reports([RESULTS, RESULTS / "noto", RESULTS / "equal"])
    found = paired_differences(*(runs[row] for row in rows))["dino_i"]
    assert len(gains) == 30
    for concept, gain in gains.items():
        own = [value for row, value in found if row.concept == concept]
        assert gain == pytest.approx(sum(own) / len(own), abs=1e-6)
    if method == "ico":
        ordered = sorted(gains, key=gains.get)
        assert set(ordered[:4]) == {"noto-rabbit", "noto-sunhat", "noto-clock", "noto-fish"} and ordered[-1] == "cake"
        assert sum(gain < 0 for gain in gains.values()) == 8  # "for eight of thirty it is negative"


def test_the_places_that_long_training_loses_are_as_many_as_the_page_says():
    page = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs/overfitting.json").read_text())
    assert len(measured) == 2
    for steps, own in zip(("500", "3,000"), measured.values(), strict=True):
        right = round(own["place_right"] * own["images"])
        low, high = binomtest(right, own["images"]).proportion_ci(method="wilson")
        place = f"{100 * own['place_right']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        like = "{:.3f} [{:.3f}, {:.3f}]".format(own["likeness"], *own["likeness_interval"])
        assert f"| {steps} | {place} | {like} |" in page


def test_ratios_of_speed_are_those_of_the_stored_runs():
    """Every measured ratio of the page, with its range, is some stored run's; at least one from each file that it names."""
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    stored = {}
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        for measured in json.loads(file.read_text()).get("measurements", []):
            for ratio in measured.get("ratios", {}).values():
                low, high = ratio["range"]
                stored[f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"] = file.stem
    said = re.findall(r"(?<=\| )\d\.\d\d \[[^]]*\]", page)
    assert len(said) == 10 and set(said) <= stored.keys()
    assert len({stored[ratio] for ratio in said}) == 8  # as many runs


def test_what_the_base_model_can_do_is_as_the_page_says():
    page = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs/base-evaluation.json").read_text())

    def shown(right, images):
        interval = binomtest(right, images).proportion_ci(method="wilson")
        return f"{100 * right / images:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"

    assert measured["images"] == len(measured["prompts"]) == 1024
    for what in ("place", "noun", "both"):
        assert f"| {what} right | {shown(round(measured[f'{what}_right'] * 1024), 1024)} |" in page
    shares = measured["noun_right_by_noun"]
    low = sorted(noun for noun, share in shares.items() if share < 0.7)
    assert {shares[noun] for noun in low} == {11 / 16}
    said = f"in 11 of 16 images, {shown(11, 16)}, where 70 % was the aim: {', '.join(low[:-1])} and {low[-1]}."
    assert said in page.replace("\n", " ")
    psnr = "{:.1f} dB [{:.1f}, {:.1f}]".format(measured["psnr"], *measured["psnr_interval"])
    assert f"(`data/tiny/held-out.webp`) | {psnr} | 29 dB |" in page


def test_steps_per_second_are_those_of_the_stored_runs():
    """Each cell of the table, and none is left out that was measured for a row."""
    page = (ROOT / "docs/fine-tuning.md").read_text(encoding="utf-8")
    files = ("train-settings-tiny-cpu", "train-settings-sd-v1-cpu-256px")
    stored = [json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["measurements"] for name in files]
    table = page[page.index("| `training.` |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 8
    for line in table:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        options = {option.removeprefix("data.") for option in re.sub("[`,]", "", name).split()} - {"precision=fp32"}
        expected = []
        for measured in stored:
            runs = {frozenset(re.sub(r"\b(training|data)\.", "", m["setting"]).split()): m for m in measured}
            if own := runs.get(frozenset(options)):
                rates = own["steps_per_second"], 1 / max(own["seconds"]), 1 / min(own["seconds"])
                expected += ["{:.2f} [{:.2f}, {:.2f}]".format(*rates), f"{own['peak_gib']:.2f} GiB"]
            else:
                expected += ["", ""]
        assert cells == expected


def test_what_the_model_can_be_taught_is_as_the_page_says():
    """The drawings' scores are in two files; the page has their means, and differences of the same drawings."""
    page = (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    after, before = (
        json.loads((ROOT / f"docs/{name}.json").read_text())["concepts"] for name in ("concepts", "concepts-before")
    )
    drawings = {"concept": list(after["ico-tiny"])}

    def cells(values_of, signed=False):
        shown = []
        for metric in ("right_drawing", "place_right", "likeness"):
            found = bootstrap_mean([values_of(drawing, metric) for drawing in drawings["concept"]], drawings)
            form = f"{'+' if signed else ''}.{3 if metric == 'likeness' else 1}f"
            mean, low, high = (
                format(x if metric == "likeness" else 100 * x, form) for x in (found.mean, found.low, found.high)
            )
            shown.append(f"{mean}{'' if metric == 'likeness' else ' pp' if signed else ' %'} [{low}, {high}]")
        return " | ".join(shown).replace("-", "−") + " |"

    for scores in (after, before):
        for method in ("ico-tiny", "custom-diffusion-tiny"):
            assert cells(lambda drawing, metric, own=scores[method]: own[drawing][metric]) in page
    for better, worse in (("ico-tiny", before["ico-tiny"]), ("ico-tiny", after["custom-diffusion-tiny"])):
        assert cells(lambda d, m, a=after[better], b=worse: a[d][m] - b[d][m], signed=True) in page
