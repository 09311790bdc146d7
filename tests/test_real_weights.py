"""docs/real-weights.md: its dry runs print what the page says, on data sets of the published size."""

import re
import shlex

import published
import pytest
from helpers import ROOT, run_main

PAGE = ROOT / "docs/real-weights.md"
MADE = {
    "dreambench": published.dreambench,
    "customconcept101": published.customconcept101,
    "dreambench-ablations": published.dreambench,
}


def commands():
    """The words of the page's commands, those of a line together."""
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]


def test_there_are_ten_commands():
    numbers = re.findall(r"# (\d+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert numbers == [str(i + 1) for i in range(10)] and len(commands()) == 10


@pytest.mark.slow
@pytest.mark.parametrize("suite", MADE)
def test_the_dry_run_is_what_the_page_shows(suite, tmp_path, capfd):
    text = PAGE.read_text(encoding="utf-8")
    (shown,) = re.findall(rf"<!-- dry-run: {suite} -->\n```text\n(.*?)```", text, re.S)
    (words,) = [words for words in commands() if "--dry-run" in words and f"configs/eval/{suite}.yaml" in words]
    folder = MADE[suite](tmp_path / "data")
    given = [f"dataset.folder={folder}" if word.startswith("dataset.folder=") else word for word in words[2:]]
    run_main("compare.py", *given, f"outdir={tmp_path}")
    assert capfd.readouterr().out.endswith(shown)


def test_the_disk_is_what_the_numbers_make():
    """Concept files and checkpoints from Stable Diffusion's shapes, the rest from the counts of the dry runs."""
    text = PAGE.read_text(encoding="utf-8")
    (numbers,) = re.findall(r"concept files, ([\d.]+) million", text)
    widths = [320, 320, 640, 640, 1280, 1280, 1280, *[1280] * 3, *[640] * 3, *[320] * 3]  # of the sixteen layers
    values = 2 * 768 * sum(widths)
    assert values / 1e6 == pytest.approx(float(numbers), abs=0.05)
    concept, checkpoint = 2 * values / 1e6, 2 * 3 * 4 * values / 1e6
    assert round(concept) == 38 and checkpoint == pytest.approx(460, rel=0.01)
    counts = re.findall(r"^([\d,]+) trainings and ([\d,]+) images .* and ([\d,]+) regularization images", text, re.M)
    assert len(counts) == 3
    for column, found in enumerate(counts):
        trainings, images, made = (int(count.replace(",", "")) for count in found)
        rows = [line for line in text.splitlines() if re.match(r"\| .*GB\W* \| .*GB\W* \| .*GB\W* \|$", line)]
        cells = [re.findall(r"([\d.]+) GB", line)[column] for line in rows]
        parts = [images * 0.5e-3, made * 0.5e-3, trainings * concept / 1e3, trainings * checkpoint / 1e3, images * 4e-6]
        for said, part in zip(cells, [*parts, sum(parts)], strict=True):
            assert float(said) == pytest.approx(part, rel=0.1, abs=0.06)
