"""Reports of scores: tables (CSV, JSON, Markdown) and one self-contained HTML page."""

import base64
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from PIL import Image

from dci.evaluation.answers import QUESTIONS, Answer, agreements, preferences, raters
from dci.evaluation.bootstrap import Interval
from dci.evaluation.encoders import INCEPTION
from dci.evaluation.metrics import CLIP_I, CLIP_T, DINO_I, KID, LABELS, PLACE
from dci.evaluation.plots import agreement_plot, fidelity_editability_plane, inline_svg, scores_by_prompt
from dci.evaluation.ratings import PREFIX
from dci.evaluation.scores import REPORT, ImageScore, RunScores, as_json, difference
from dci.evaluation.scoring_metadata import BootstrapMetadata, KidMetadata
from dci.files import write_atomically
from ldm.errors import UserError
from ldm.images import read_image
from ldm.texts import readable

PAGE, TEXT, SUMMARY, IMAGES = "report.html", "report.md", "summary.csv", "images.csv"
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_SIDE = 192  # pixels of the longer side of an image on the page
_SHARE = {"noun", "place"}  # metrics shown in per cent


def write_report(
    outdir: str | Path,
    runs: Sequence[RunScores],
    title: str,
    notes: Sequence[str] = (),
    figures: Sequence[tuple[str, Figure]] = (),
    max_images: int = 160,
    answers: Sequence[Answer] = (),
) -> Path:
    """Write `report.html`, `report.md`, `scores.json`, `summary.csv` and `images.csv`.

    Args:
        runs: rows of the tables, one or more; differences are to the first.
        notes: paragraphs below the title.
        figures: (caption, figure) on the page behind its own plots.
        max_images: that the page may show, references aside.
        answers: of people to pairs of these images; the report shows how often the metrics agree.

    Returns:
        The page's file.

    Raises:
        UserError: an image that the page should show cannot be read, or an answer is about one that is not there.
    """
    outdir, runs = Path(outdir), [_from_here(run) for run in runs]
    differences = differences_to_first(runs)
    tables = human_tables(runs, answers) if answers else []
    plots = _plots(runs, answers)
    page = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = page.get_template("report.html.j2").render(
        title=title,
        notes=notes,
        table=summary_table(runs),
        differences=difference_table(differences, runs[0].name),
        people=tables,
        plots=[(caption, inline_svg(figure, caption)) for caption, figure in [*plots, *figures]],
        references=[data_url(file) for file in runs[0].scores.metadata.references[:10]],
        **_gallery(runs, max_images),
        methods=[*how_measured(runs), *([_about_people(answers)] if answers else [])],
    )
    write_atomically(outdir / PAGE, readable(html).encode())
    write_atomically(outdir / TEXT, readable(_markdown(runs, title, notes, differences, tables)).encode())
    write_scores(outdir / REPORT, runs, title, differences)
    write_atomically(outdir / SUMMARY, readable(_csv(_summary_rows(runs))).encode())
    write_atomically(outdir / IMAGES, readable(_csv(_image_rows(runs))).encode())
    return outdir / PAGE


def write_scores(
    file: str | Path, runs: Sequence[RunScores], title: str, differences: dict[str, dict[str, Interval]] | None = None
) -> None:
    """Write what `dci.evaluation.scores.read_report` reads: JSON with every image's scores.

    Args:
        differences: of later runs to the first, see `differences_to_first`.
    """
    runs = [_from_here(run) for run in runs]
    content = {
        "title": title,
        "runs": [{"name": run.name, "series": run.series, **as_json(run.scores)} for run in runs],
        "differences": as_json(differences or {}),
    }
    write_atomically(Path(file), f"{_row_by_row(content)}\n".encode())


def _plots(runs: Sequence[RunScores], answers: Sequence[Answer]) -> list[tuple[str, Figure]]:
    """The page's own figures with their captions."""
    plane = {LABELS[name]: fidelity_editability_plane(runs, fidelity=name) for name in (DINO_I, CLIP_I)}
    plots = [
        (f"Editability (CLIP-T) and fidelity ({name}). Bars: 95 % intervals; dashed: Pareto front.", figure)
        for name, figure in plane.items()
    ]
    plots += [
        (f"{LABELS[name]} of each prompt, with intervals over its images.", scores_by_prompt(runs, name))
        for name in (CLIP_T, DINO_I)
    ]
    if found := agreements(runs, answers) if answers else []:
        plots.append(("How often metrics prefer what people prefer; dashed: chance.", agreement_plot(found)))
    return plots


def _from_here(run: RunScores) -> RunScores:
    """Name files below the current folder by their paths from there: a report may be passed on."""

    def short(file: str) -> str:
        return str(Path(file).relative_to(Path.cwd())) if Path(file).is_relative_to(Path.cwd()) else file

    scores = run.scores
    rows = tuple(dataclasses.replace(row, file=short(row.file)) for row in scores.rows)
    known = scores.metadata
    references = tuple(short(file) for file in known.references)
    metadata = dataclasses.replace(known, references=references, folder=short(known.folder) if known.folder else "")
    return dataclasses.replace(run, scores=dataclasses.replace(scores, rows=rows, metadata=metadata))


def differences_to_first(runs: Sequence[RunScores]) -> dict[str, dict[str, Interval]]:
    """Return name of each later run -> metric -> its paired difference to the first, where they share prompts and seeds."""
    found = {}
    for run in runs[1:]:
        try:
            found[run.name] = difference(run.scores, runs[0].scores)
        except UserError:  # nothing in common, nothing to compare
            continue
    return found


def metrics_of(runs: Sequence[RunScores]) -> list[str]:
    """Return the metrics that any of the runs has, in the tables' order; ratings that were brought in come last."""
    return _in_order(name for run in runs for name in run.scores.summary)


def _in_order(names: Iterable[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [*(name for name in LABELS if name in found), *(name for name in found if name not in LABELS)]


def summary_table(runs: Sequence[RunScores]) -> list[list[tuple[str, str]]]:
    """Return the table of means: a row of labels, then one for each run; cells are (mean, interval)."""
    names = metrics_of(runs)
    head = [
        ("", ""),
        ("images", ""),
        *((LABELS.get(name, name), "(lower is better)" if name == KID else "") for name in names),
    ]
    return [
        head,
        *(
            [(run.name, ""), (str(len(run.scores.rows)), ""), *(_cell(name, run.scores.summary.get(name)) for name in names)]
            for run in runs
        ),
    ]


def difference_table(differences: dict[str, dict[str, Interval]], first: str) -> list[list[tuple[str, str, bool]]]:
    """Return the table of paired differences; cells are (mean, interval, whether the interval leaves zero out)."""
    names = _in_order(name for row in differences.values() for name in row)
    head = [(f"less {first}", "", False), *((LABELS.get(name, name), "", False) for name in names)]
    body = [
        [(pair, "", False), *((*_cell(name, row.get(name), signed=True), _clear(row.get(name))) for name in names)]
        for pair, row in differences.items()
    ]
    return [head, *body] if body else []


def human_tables(runs: Sequence[RunScores], answers: Sequence[Answer]) -> list[list[list[tuple[str, str]]]]:
    """Return what people preferred, and how often each metric prefers the same, as tables of (text, interval)."""
    preferred: list[list[tuple[str, str]]] = [[("people prefer", ""), ("over", ""), *((q, "") for q in QUESTIONS.values())]]
    shares = {(question, (run, other)): share for question, run, other, share in preferences(answers)}
    for pair in dict.fromkeys(pair for _, pair in shares):
        cells = [_share_cell(shares.get((question, pair))) for question in QUESTIONS]
        preferred.append([*((name, "") for name in pair), *cells])
    agreed: list[list[tuple[str, str]]] = [[("question", ""), ("metric", ""), ("agrees with people", ""), ("answers", "")]]
    for found in agreements(runs, answers):
        name = LABELS.get(found.metric, found.metric)
        agreed.append([(QUESTIONS[found.question], ""), (name, ""), _share_cell(found.share), (str(found.share.n), "")])
    return [preferred, agreed]


def _share_cell(share: Interval | None) -> tuple[str, str]:
    return _cell(PLACE, share)  # a share as those of right places


def _about_people(answers: Sequence[Answer]) -> str:
    return (
        f"{len(answers)} answers by {raters(answers)} {'person' if raters(answers) == 1 else 'people'} to blind pairs. This "
        "project rates nothing itself. Where a metric has the same value for both images it counts half; intervals are over "
        "concepts, prompts and seeds."
    )


def how_measured(runs: Sequence[RunScores]) -> list[str]:
    """Return sentences that explain the numbers, each once, whatever the number of runs."""
    sentences = [
        "CLIP-T is the cosine of an image's embedding and its prompt's, the modifier tokens taken out; CLIP-I and DINO-I "
        "are the mean cosine to the reference images. Values of different encoders cannot be compared.",
    ]
    if any("clip_t_w2.5" in run.scores.summary for run in runs):
        sentences.append("CLIP-T × 2.5 is Custom Diffusion's text score, 2.5 max(cos, 0): another scale than CLIP-T.")
    if any("place" in run.scores.summary for run in runs):
        sentences.append(
            "Noun and place right: share of the images in which the embedded classifier sees the noun or "
            "place of the prompt, among those whose prompt names exactly one that it knows. Where all images "
            "are right, or none, the interval has no width: resampling knows no others."
        )
    for run in runs:
        metadata = run.scores.metadata
        if metadata.encoders:
            roles = {"clip": "CLIP-T and CLIP-I", "instance": "DINO-I"}
            sentences += [
                f"{metric}: {metadata.encoders[role]} ({metadata.preprocessing[role]})." for role, metric in roles.items()
            ]
        if metadata.object_only:
            sentences.append(metadata.object_only)
        if metadata.kid:
            sentences.append(_about_kid(metadata.kid))
        if metadata.interval:
            sentences.append(_about_intervals(metadata.interval, metadata.resampled))
    if any(name.startswith(PREFIX) for run in runs for name in run.scores.summary):
        sentences.append("Ratings were brought in from a table; this project made none of them.")
    if len(runs) > 1:
        sentences.append(
            "Differences are taken between images of the same prompt and seed; an interval that leaves out zero is marked."
        )
    return list(dict.fromkeys(sentences))


def _about_kid(kid: KidMetadata) -> str:
    kernel = "(x·y / d + 1)³" if kid.features == INCEPTION else "(cosine + 1)³"
    return (
        f"KID: squared maximum mean discrepancy (kernel {kernel}, unbiased) of the features of {kid.features} to "
        f"{kid.real} real images, over 100 subsets of {kid.subset_size}; the interval is that of all."
    )


def _about_intervals(interval: BootstrapMetadata, resampled: dict[str, int]) -> str:
    factors = " and ".join(f"{name}s ({levels})" for name, levels in resampled.items())
    several = (
        "each of them drawn with replacement by itself; an image counts as often as the product of its draws"
        if len(resampled) > 1
        else "drawn with replacement"
    )
    return (
        f"Intervals: {100 * interval.level:.0f} % percentile bootstrap over {factors}, {several}; "
        f"{interval.resamples} resamples, seed {interval.seed}."
    )


def _cell(name: str, value: Interval | None, signed: bool = False) -> tuple[str, str]:
    """(mean, interval) in words."""
    if value is None:
        return "–", ""
    factor, spec = (100, ".1f") if name in _SHARE else (1, ".4f")
    spec = ("+" if signed else "") + spec
    texts = [format(factor * number, spec).replace("-", "−") for number in (value.mean, value.low, value.high)]
    unit = (" pp" if signed else " %") if name in _SHARE else ""
    return texts[0] + unit, "" if math.isnan(value.low) else f"[{texts[1]}, {texts[2]}]"


def _clear(value: Interval | None) -> bool:
    return value is not None and (value.low > 0 or value.high < 0)


def _gallery(runs: Sequence[RunScores], most: int) -> dict:
    """Images of the page: for each prompt a row of every run's first images.

    Where there are more prompts than the page may show, evenly spaced ones are taken.
    """
    by_run = []
    for run in runs:
        groups: dict[tuple[str, str], list[ImageScore]] = {}
        for row in run.scores.rows:
            groups.setdefault((row.concept, row.prompt), []).append(row)
        by_run.append((run.name, groups))
    keys = list(dict.fromkeys(key for _, groups in by_run for key in groups))
    each = max(1, min(4, most // max(1, len(keys) * len(runs))))
    number = min(len(keys), max(1, most // (each * len(runs))))
    chosen = [keys[i * len(keys) // number] for i in range(number)] if keys else []
    gallery = [
        {
            "concept": concept,
            "prompt": prompt,
            "runs": [
                (name, [(data_url(row.file), _scores_of(row)) for row in groups.get((concept, prompt), [])[:each]])
                for name, groups in by_run
            ],
        }
        for concept, prompt in chosen
    ]
    return {"gallery": gallery, "prompts": len(keys), "each": each}


def _scores_of(row: ImageScore) -> str:
    values = " · ".join(
        f"{LABELS.get(name, name)} {_cell(name, Interval(value, math.nan, math.nan, 1))[0]}"
        for name, value in row.values.items()
    )
    return f"{Path(row.file).name}: {row.text} · {values}"


def data_url(file: str | Path) -> str:
    """Return an image, made smaller where it is large, as a data: URL."""
    image = read_image(file)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small, content = max(image.size) < _SIDE, io.BytesIO()
    image.save(content, "PNG", optimize=True) if small else image.save(content, "JPEG", quality=88)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def _markdown(runs: Sequence[RunScores], title: str, notes: Sequence[str], differences: dict, people: list) -> str:
    lines = [f"# {title}", *(line for note in notes for line in ("", note)), "", *_markdown_table(summary_table(runs))]
    if table := difference_table(differences, runs[0].name):
        lines += ["", "Paired differences; bold where the interval leaves out zero:", "", *_markdown_table(table)]
    for table in people:
        lines += ["", *_markdown_table(table)]
    return "\n".join([*lines, "", *(f"* {sentence}" for sentence in how_measured(runs))]) + "\n"


def _markdown_table(table: list[list[tuple]]) -> list[str]:
    def text(cell: tuple) -> str:
        value = f"**{cell[0]}**" if len(cell) > 2 and cell[2] else cell[0]
        return f"{value} {cell[1]}".strip().replace("|", "\\|")

    rows = [f"| {' | '.join(map(text, row))} |" for row in table]
    return [rows[0], "|" + "---|" * len(table[0]), *rows[1:]]


def _summary_rows(runs: Sequence[RunScores]) -> list[dict]:
    return [
        {"run": run.name, "series": run.series, "metric": name, "mean": i.mean, "low": i.low, "high": i.high, "n": i.n}
        for run in runs
        for name, i in run.scores.summary.items()
    ]


def _image_rows(runs: Sequence[RunScores]) -> list[dict]:
    names = list(dict.fromkeys(name for run in runs for row in run.scores.rows for name in row.values))
    return [
        {
            "run": run.name,
            "file": row.file,
            "concept": row.concept,
            "prompt": row.prompt,
            "text": row.text,
            "seed": row.noise,
            **{name: row.values.get(name, "") for name in names},
        }
        for run in runs
        for row in run.scores.rows
    ]


def _csv(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in rows)
    return file.getvalue()


def _row_by_row(content: dict[str, Any]) -> str:
    """JSON with a line for each image: a report may have many thousands, and its changes should be readable."""
    runs = []
    for run in content["runs"]:
        rows = ",\n".join(json.dumps(row) for row in run["rows"])
        rest = json.dumps({name: value for name, value in run.items() if name != "rows"})
        runs.append(f'{rest[:-1]}, "rows": [\n{rows}\n]}}')
    rest = json.dumps({name: value for name, value in content.items() if name != "runs"})
    return rest[:-1] + ', "runs": [\n' + ",\n".join(runs) + "\n]}"
