"""Tables of a text whose numbers are those of a report: filled from its `scores.json`, each number with its interval.

A table that belongs to a report follows a line

    <!-- numbers: docs/results-tiny/scores.json -->

or to several, with spaces between their files; a row that two of them have is of the concepts of both. Its first column
names, behind a number of the row, a row of the report or a difference of two,

    | 3 · `ico, dci` less `ico, plain` |
    | 4 · `ico, small` less `cd, small` beside `ico, usual` less `cd, usual` |

(the fourth row says how much larger the first difference is than the second). A difference may be of some images alone:

    | 5 · `ico, dci` less `cd, plain` without `cake` and `rabbit` |          other concepts
    | 6 · `cd, dci` less `cd, plain` where the place is right |              in the image of the run behind "less"; or wrong

The heads of the other columns end in a metric's name as the reports have it, such as "fidelity (DINO-I)". What these
cells say is written by `fill`; a text that already says it comes back as it is.
"""

import re
from collections.abc import Callable
from pathlib import Path

from dci.evaluation.bootstrap import Interval, bootstrap_mean
from dci.evaluation.metrics import LABELS, NOUN, PLACE
from dci.evaluation.scores import ImageScore, Scores, columns, paired_differences, read_reports
from ldm.errors import UserError

_TABLE = re.compile(r"^<!-- numbers: (?P<files>\S+(?: \S+)*) -->\n\n?(?P<table>(?:\|.*\|\n)+)", re.MULTILINE)
_SHARES = (NOUN, PLACE)
Differences = dict[str, list[tuple[ImageScore, float]]]
"""Metric -> images and their paired differences, as `paired_differences` returns them."""


def fill(text: str, root: str | Path) -> str:
    """Return a text with the numbers of its marked tables as the reports have them.

    Args:
        root: the folder that the tables' files are relative to.

    Raises:
        UserError: a report, a row or a metric that there is not, or a row that two of a table's reports have of one concept.
    """

    def filled(match: re.Match) -> str:
        head, rule, *rows = match["table"].splitlines()
        runs = read_reports([Path(root) / file for file in match["files"].split()])
        metrics = [_metric(cell) for cell in _cells(head)[1:]]
        lines = [head, rule, *(_row(_cells(row)[0], metrics, runs) for row in rows)]
        return match[0].replace(match["table"], "".join(f"{line}\n" for line in lines))

    return _TABLE.sub(filled, text)


def rows_of(text: str) -> dict[int, str]:
    """Return the numbered rows of a text's marked tables: number -> what the row is of."""
    names = [_cells(line)[0] for match in _TABLE.finditer(text) for line in match["table"].splitlines()[2:]]
    return {int(match[1]): match[2] for name in names if (match := re.match(r"(\d+) · (.+)", name))}


def without_tables(text: str) -> str:
    """Return a text without its marked tables."""
    return _TABLE.sub("", text)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _metric(head: str) -> str:
    found = [metric for metric, label in LABELS.items() if re.search(rf"(^|\W){re.escape(label)}\)?$", head)]
    if not found:
        raise UserError(f"no metric '{head}': expected a column's head that ends in one of {', '.join(LABELS.values())}")
    return found[0]


def _row(name: str, metrics: list[str], runs: dict[str, Scores]) -> str:
    of, _, without = name.partition(" without ")
    rows, left_out = (re.findall(r"`([^`]+)`", part) for part in (of, without))
    for row in rows:
        if row not in runs:
            raise UserError(f"no row '{row}' in the report: it has {'; '.join(runs)}")
    if len(rows) in (2, 4):
        found = paired_differences(runs[rows[0]], runs[rows[1]])
        if len(rows) == 4:
            found = _beside(found, paired_differences(runs[rows[2]], runs[rows[3]]))
        found = _without(_where(found, of, runs[rows[1]]), left_out)
        cells = [_difference(metric, found.get(metric)) for metric in metrics]
    elif len(rows) == 1:
        cells = [_shown(metric, runs[rows[0]].summary.get(metric)) for metric in metrics]
    else:
        raise UserError(f"'{name}' names no row: expected `ROW`, `ROW` less `ROW`, or two differences with beside between")
    return f"| {' | '.join([name, *cells])} |"


def _beside(found: Differences, other: Differences) -> Differences:
    """Differences less those of the same concept, prompt and noise in another pair."""
    known = {m: {(row.concept, row.prompt, row.noise): value for row, value in pairs} for m, pairs in other.items()}
    both = {
        metric: [
            (row, value - known[metric][key])
            for row, value in pairs
            if (key := (row.concept, row.prompt, row.noise)) in known[metric]
        ]
        for metric, pairs in found.items()
        if metric in known
    }
    return {metric: pairs for metric, pairs in both.items() if pairs}


def _where(found: Differences, name: str, baseline: Scores) -> Differences:
    """Differences where the baseline's image has its place, or has not, if the row's name says so."""
    if not (asked := re.search(r" where the place is (right|wrong)$", name)):
        return found
    places = {(row.concept, row.prompt, row.noise): row.values.get(PLACE) for row in baseline.rows}
    wanted = float(asked[1] == "right")
    return {
        metric: some
        for metric, pairs in found.items()
        if (some := [(row, value) for row, value in pairs if places[row.concept, row.prompt, row.noise] == wanted])
    }


def _without(found: Differences, concepts: list[str]) -> Differences:
    """Differences of the other concepts.

    Raises:
        UserError: a concept that there is not.
    """
    known = {row.concept: None for pairs in found.values() for row, _ in pairs}
    for concept in concepts:
        if concept not in known:
            raise UserError(f"no concept '{concept}' in the report: it has {', '.join(known)}")
    return {metric: [(row, value) for row, value in pairs if row.concept not in concepts] for metric, pairs in found.items()}


def _difference(metric: str, found: list | None) -> str:
    if found is None:
        return "–"
    rows, differences = zip(*found, strict=True)
    interval = bootstrap_mean(differences, columns(rows))
    text = _shown(metric, interval, signed=True)
    mean, _, rest = text.partition(" [")
    return f"**{mean}** [{rest}" if interval.low > 0 or interval.high < 0 else text


def _shown(metric: str, interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return "–"
    share, sign = metric in _SHARES, "+" if signed else ""
    text: Callable[[float], str] = lambda x: format(100 * x if share else x, f"{sign}.{1 if share else 3}f")  # noqa: E731
    unit = (" pp" if signed else " %") if share else ""
    return f"{text(interval.mean)}{unit} [{text(interval.low)}, {text(interval.high)}]".replace("-", "−")
