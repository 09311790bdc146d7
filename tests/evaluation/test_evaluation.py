"""Folders of images -> scores -> a report: both layouts, bad input, and a page that needs nothing else."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import ROOT, mostly_slow, refused, run_here, run_main
from PIL import Image

from dci.evaluation.bootstrap import Interval
from dci.evaluation.evaluate import Scoring, ScoringObservers, evaluate_folder, load_encoders, recorded_references
from dci.evaluation.plots import fidelity_editability_plane, inline_svg
from dci.evaluation.report import write_report
from dci.evaluation.scores import ImageScore, RunScores, Scores, summarize
from dci.samples.reader import read_samples, without_modifiers
from ldm.embedded_encoders import load_clip, load_instance_encoder
from ldm.errors import UserError
from ldm.images import read_image, to_tensor

REFERENCES = ROOT / "data/concepts/cat"


@pytest.fixture(scope="module")
def encoders():
    return load_encoders()


def folder_of(path, record, number=None, name="prompts.json"):
    """A folder with so many images and a prompts.json."""
    (path / "samples").mkdir(parents=True)
    for i in range(len(record) if number is None else number):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"samples/{i:05}.png")
    (path / name).write_text(json.dumps(record))
    return path


PROMPTS = ["photo of a <new1> cat", "a <new1>  cat in the snow", "photo of a <new1> cat", "a <new1> cat in the snow"]


@pytest.mark.parametrize(
    "record",
    [
        {f"{i:05}": p for i, p in enumerate(PROMPTS)},
        {f"{i:05}.png": p for i, p in enumerate(PROMPTS)},
        {f"samples/{i:05}.png": p for i, p in enumerate(PROMPTS)},
        {f"{i:05}": {"prompt": p, "steps": 50} for i, p in enumerate(PROMPTS)},
        PROMPTS,
        [{"file_name": f"{i:05}.png", "text": p} for i, p in reversed(list(enumerate(PROMPTS)))],
    ],
    ids=["stems", "names", "paths", "metadata", "list", "list of metadata"],
)
def test_every_layout_gives_the_same_prompts(record, tmp_path):
    samples = read_samples(folder_of(tmp_path / "run", record))
    assert [s.file.name for s in samples] == [f"{i:05}.png" for i in range(4)]
    assert [s.text for s in samples] == ["photo of a cat", "a cat in the snow"] * 2
    assert [s.noise for s in samples] == [""] * 4


def listed(folder, names, metadata=str):
    """What a list of prompts, the numbers in the names' order as they are given, says of each image."""
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "prompts.json").write_text(json.dumps([metadata(f"prompt {i}") for i in range(len(names))]))
    return {sample.file.name: sample.prompt for sample in read_samples(folder)}


@pytest.mark.parametrize(
    "name", ["{}.png", "{:05}.png", "sample-{}.jpg", "{}_of_12.webp", "Seed7 {}.png", "0{}.png", "v2.{}.png"]
)
@pytest.mark.parametrize("number", mostly_slow([1, 2, 10, 12, 101], 12))
@pytest.mark.parametrize("metadata", [str, lambda text: {"prompt": text, "seed": 3}], ids=["texts", "metadata"])
def test_a_list_of_prompts_follows_the_numbers_of_the_images(name, number, metadata, tmp_path):
    names = [name.format(i) for i in range(number)]
    assert listed(tmp_path, names, metadata) == {one: f"prompt {i}" for i, one in enumerate(names)}


@pytest.mark.parametrize(
    "names", [["a.png", "b.png", "c.png"], ["cat.png", "dog 2.png"], ["1-2.png", "1-10.png", "2-1.png"]]
)
def test_a_list_of_prompts_follows_names_that_have_one_order(names, tmp_path):
    assert listed(tmp_path, names) == {one: f"prompt {i}" for i, one in enumerate(names)}


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "01.png"],
        ["cat 2.png", "cat 10.png", "dog.png"],
        ["B.png", "a.png"],
        ["7.png", "7.jpg"],
        ["x9.png", "y1.png", "x10.png"],
        ["A.png", "a.png"],
    ],
)
def test_a_list_whose_order_is_not_certain_is_refused(names, tmp_path):
    with pytest.raises(UserError, match="prompts.json lists prompts without names, and the order of .* is not certain"):
        listed(tmp_path, names)


def test_two_prompts_for_one_image_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "prompts.json").write_text(json.dumps({"a/0.png": "a cat", "b/0.png": "a dog"}))
    with pytest.raises(UserError, match="two prompts for 0, the second under b/0.png"):
        read_samples(tmp_path)


def test_facts_of_this_package_are_understood(tmp_path):
    metadata = {
        "prompt": "a V* on the beach",
        "concept_prompt": "a <new1> <new2> cat on the beach",
        "seed": 7,
        "index": 3,
        "auxiliary_prompt": "a plushy toy on the beach",
    }
    (sample,) = read_samples(folder_of(tmp_path / "run", {"00000": metadata}))
    assert (sample.prompt, sample.text, sample.noise) == ("a V* on the beach", "a cat on the beach", "7:3")


@pytest.mark.parametrize(
    ("prompt", "nouns", "text"),
    [
        ("photo of a <new1> cat", [], "photo of a cat"),
        ("photo of a <new1> <new2><new3> cat, smiling", ["cat"], "photo of a cat, smiling"),
        ("a V* on the beach", ["cat"], "a cat on the beach"),
        ("a V* cat on the beach", ["cat"], "a cat on the beach"),
        ("a {} cat", ["cat"], "a cat"),
        ("two V* cats and a catalogue", ["cat"], "two cats and a catalogue"),
        ("a V* catalogue", ["cat"], "a cat catalogue"),
        ("a {} with a {}", ["teddy bear"], "a teddy bear with a teddy bear"),
        ("a V1* cat and V2* in the snow", ["cat", "car"], "a cat and car in the snow"),
        ("{0} beside {1}", ["cat", "car"], "cat beside car"),
        ("a V* , red", [], "a, red"),
        ("a TV* set", ["cat"], "a TV* set"),
        ("eine Katze im Café, <new1> 猫", [], "eine Katze im Café, 猫"),
    ],
)
def test_modifiers_are_taken_out_of_the_text(prompt, nouns, text):
    assert without_modifiers(prompt, nouns) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_records_of_any_unicode_are_read(encoding, tmp_path):
    folder = folder_of(tmp_path / "run", {"00000": "x"})
    (folder / "prompts.json").write_text(json.dumps({"00000": "un <new1> café 猫"}, ensure_ascii=False), encoding=encoding)
    assert read_samples(folder)[0].text == "un café 猫"


def spoil(folder, how):
    record = folder / "prompts.json"
    if how == "no record":
        record.unlink()
    elif how == "latin":
        record.write_bytes('{"00000": "café"}'.encode("latin-1"))
    elif how == "cut":
        record.write_text('{"00000": "a')
    elif how == "number":
        record.write_text("3")
    elif how == "empty":
        record.write_text("{}")
    elif how == "no prompt":
        record.write_text('{"00000": "a cat"}')
    elif how == "no text":
        record.write_text('{"00000": {"seed": 3}, "00001": "a cat"}')
    elif how == "short list":
        record.write_text('["a cat"]')
    elif how == "no images":
        for file in (folder / "samples").iterdir():
            file.unlink()
    elif how == "broken":
        (folder / "samples/00001.png").write_bytes((folder / "samples/00001.png").read_bytes()[:300])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no record", ["no ", "prompts.json"]),
        ("latin", ["prompts.json is not UTF-8"]),
        ("cut", ["not readable as JSON"]),
        ("number", ["holds no prompts"]),
        ("empty", ["holds no prompts"]),
        ("no prompt", ["no prompt for 00001.png"]),
        ("no text", ["where a prompt was expected"]),
        ("short list", ["lists 1 prompts for 2 images"]),
        ("no images", ["no images in"]),
        ("broken", ["00001.png is not a readable image"]),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(how, words, tmp_path, capfd):
    folder = folder_of(tmp_path / "run", {"00000": "a cat", "00001": "a cat"})
    spoil(folder, how)
    result = run_here(capfd, "evaluate.py", "--samples", folder, "--references", REFERENCES, "--out", tmp_path / "out")
    errors = "\n".join(line for line in result.stderr.splitlines() if "features" not in line or "error" in line)
    result.stderr = errors.split("\r")[-1]
    refused(result, *words)


GIVEN = ("--references", str(REFERENCES))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{}/none"], "no folder"),
        (["a={}/run", "a={}/run"], "taken"),
        (["a={}/run", "b={}/run"], "'a' is this folder already"),
        (["{}/run", "--clip", "clip"], "no encoder 'clip'"),
        # Before an encoder is loaded, let alone an image scored.
        (
            ["{}/run", *GIVEN, "--clip", "transformers:no/where", "--ratings", "{}/wrong.csv"],
            "which the report does not show",
        ),
        (["{}/run", *GIVEN, "--clip", "transformers:no/where", "--answers", "{}/wrong.csv"], "holds no answers"),
        (["{}/run", "--references", "{}/none"], "no folder"),
        (["{}/run", *GIVEN, "--regularization", "{}/none"], "no folder"),
        (["{}/run"], "give their folder as --references"),
        (["{}/run", *GIVEN, "--out", "{}/wrong.csv"], "wrong.csv is not a folder"),
    ],
)
def test_another_mistake_is_one_line(args, words, tmp_path, capfd):
    folder_of(tmp_path / "run", {"00000": "a cat", "00001": "a cat"})
    (tmp_path / "wrong.csv").write_text("file,beauty\nz.png,1\n")
    args = [arg.replace("{}", str(tmp_path)) for arg in args]
    refused(run_here(capfd, "evaluate.py", "--out", tmp_path / "out", "--samples", *args), words)


def test_a_folder_without_a_concept_needs_references(tmp_path):
    with pytest.raises(UserError, match="references="):
        recorded_references(folder_of(tmp_path / "run", {"00000": "a cat", "00001": "a cat"}))


def test_scores_are_those_of_the_encoders(encoders, tmp_path):
    record = {f"{i:05}": {"prompt": p, "seed": 5, "index": i // 2} for i, p in enumerate(PROMPTS)}
    folder = folder_of(tmp_path / "run", record)
    scores = evaluate_folder(folder, REFERENCES, encoders, Scoring(REFERENCES, scaled_text_score=True, resamples=99))
    files = sorted((folder / "samples").iterdir())
    images = torch.stack([to_tensor(read_image(file)) for file in files])
    references = torch.stack([to_tensor(read_image(file)) for file in sorted(REFERENCES.glob("*.png"))])
    clip, instance = load_clip(), load_instance_encoder()
    with torch.inference_mode():
        text = (clip.image_features(images) * clip.text_features(["photo of a cat", "a cat in the snow"] * 2)).sum(-1)
        image = (clip.image_features(images) @ clip.image_features(references).T).mean(-1)
        dino = (instance.image_features(images) @ instance.image_features(references).T).mean(-1)
    for name, expected in (("clip_t", text), ("clip_i", image), ("dino_i", dino), ("clip_t_w2.5", 2.5 * text.clamp(min=0))):
        assert [row.values[name] for row in scores.rows] == pytest.approx(expected.tolist(), abs=1e-5)
        assert scores.summary[name].mean == pytest.approx(expected.mean().item(), abs=1e-5)
    assert {"noun", "place"} <= scores.rows[1].values.keys()
    assert "place" not in scores.rows[0].values  # the prompt names none
    assert scores.summary["place"].n == 2
    assert scores.metadata.resampled == {"prompt": 3, "seed": 2}  # two blanks are another wording
    assert scores.summary["kid"].mean > 0.1  # noise is not like cats


def test_nouns_and_places_are_counted_by_a_classifier(encoders, tmp_path):
    folder = folder_of(tmp_path / "run", PROMPTS)
    with pytest.raises(UserError, match="knows no nouns and places: give"):
        evaluate_folder(folder, REFERENCES, replace(encoders, classifier=encoders.instance))


def test_images_that_the_record_names_and_that_are_missing_are_told(encoders, tmp_path):
    """An evaluation of a folder that is not complete is one of fewer images, and says so."""
    run, lines = folder_of(tmp_path / "run", {f"{i:05}": p for i, p in enumerate(PROMPTS)}, number=2), []
    evaluate_folder(run, REFERENCES, encoders, Scoring(resamples=9), observers=ScoringObservers(report=lines.append))
    assert lines == [f"Missing in {run}: 2 of the 4 images that prompts.json names (00002, 00003)"]


@pytest.mark.parametrize("name", ["gridiron.png", "grid.png", "grid-00004.png", "grids.jpg"])
@pytest.mark.parametrize("record", [lambda name: {name: "a cat"}, lambda name: [{"file": name, "prompt": "a cat"}]])
def test_an_image_is_left_out_only_as_a_grid_that_no_record_names(name, record, tmp_path):
    for file in (name, "grid-00001.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / file)
    (tmp_path / "prompts.json").write_text(json.dumps(record(name)))
    assert [sample.file.name for sample in read_samples(tmp_path)] == [name]


def test_masks_are_no_references_and_what_is_not_used_is_said(encoders, tmp_path):
    """Masks of every name beside references, samples and real images: the scores are those without them."""
    run, references, real = folder_of(tmp_path / "run", PROMPTS), tmp_path / "references", tmp_path / "real"
    for i, folder in enumerate((references, real)):
        folder.mkdir()
        for j in range(3):
            noise = np.random.default_rng(10 * i + j).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{j}.png")
    scoring = Scoring(real, resamples=99)
    expected = evaluate_folder(run, references, encoders, scoring, observers=ScoringObservers(report=pytest.fail))
    white = Image.new("L", (64, 64), 255)
    masks = {
        references: ("0.mask.png", "1-masklabel.PNG", "mask_2.png"),
        real: ("0_mask.png",),
        run: ("samples/mask-00001.jpg",),
    }
    for folder, names in masks.items():
        for name in names:
            white.save(folder / name)
    (references / "0.txt").touch()
    (references / "raw").mkdir()
    said = []
    found = evaluate_folder(run, references, encoders, scoring, observers=ScoringObservers(report=said.append))
    assert found.summary == expected.summary and found.metadata.references == expected.metadata.references
    assert said == [
        f"Not used in {references}: 1 folder (raw), 1 caption (0.txt), 3 masks (0.mask.png, 1-masklabel.PNG, mask_2.png)",
        f"Not used in {run / 'samples'}: 1 mask (mask-00001.jpg)",
        f"Not used in {real}: 1 mask (0_mask.png)",
    ]


def test_an_evaluation_does_not_depend_on_its_cache_or_batches(encoders, tmp_path):
    folder = folder_of(tmp_path / "run", PROMPTS)
    plain = evaluate_folder(folder, REFERENCES, encoders, Scoring(resamples=99))
    for _ in range(2):
        again = evaluate_folder(folder, [REFERENCES], encoders, Scoring(batch_size=1, resamples=99), tmp_path / "c.sqlite")
        assert [r.values for r in again.rows] == [pytest.approx(r.values, abs=1e-5) for r in plain.rows]


def test_several_concepts_count_alike(encoders, tmp_path):
    folder = folder_of(tmp_path / "run", PROMPTS)
    cat, car = (
        evaluate_folder(folder, ROOT / f"data/concepts/{name}", encoders, Scoring(resamples=9)) for name in ("cat", "car")
    )
    both = evaluate_folder(folder, [ROOT / "data/concepts/cat", ROOT / "data/concepts/car"], encoders, Scoring(resamples=9))
    mean = (cat.summary["dino_i"].mean + car.summary["dino_i"].mean) / 2
    assert both.summary["dino_i"].mean == pytest.approx(mean, abs=1e-6)


class Page(HTMLParser):
    """What a browser would fetch for a page, and what it shows."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.svgs = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.svgs += tag == "svg"
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe")


@pytest.mark.slow
def test_the_program_writes_a_report_that_needs_no_network(tmp_path, capfd):
    a, b = (
        folder_of(tmp_path / name, {f"{i:05}": {"prompt": p, "seed": 0, "index": i // 2} for i, p in enumerate(PROMPTS)})
        for name in "ab"
    )
    out = tmp_path / "out"
    run_main(
        "evaluate.py",
        "--samples",
        f"first <run>={a}",
        b,
        "--references",
        REFERENCES,
        "--regularization",
        REFERENCES,
        "--out",
        out,
        "--resamples",
        99,
        "--clip-t-w2.5",
        "--title",
        "Cats & <others>",
    )
    html = (out / "report.html").read_text()
    page = Page(html)
    assert page.svgs == 4
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert sum(address.startswith("data:") for address in page.addresses) == 5 + 8
    assert not re.search(r"https?:|//\w+\.\w|@import", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", html))
    assert not re.search(r"url\((?!#)", html)
    assert "Cats &amp; &lt;others&gt;" in html
    assert "first &lt;run&gt;" in html
    with open(out / "images.csv", newline="") as file:
        images = list(csv.DictReader(file))
    assert len(images) == 8
    with open(out / "summary.csv", newline="") as file:
        summary = {(row["run"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}
    mean = np.mean([float(row["clip_t"]) for row in images if row["run"] == "b"])
    assert summary["b", "clip_t"] == pytest.approx(mean)
    content = json.loads((out / "scores.json").read_text())
    assert [one["name"] for one in content["runs"]] == ["first <run>", "b"]
    assert content["differences"]["b"]["clip_t"]["mean"] == 0
    markdown = (out / "report.md").read_text()
    assert "CLIP-T × 2.5" in markdown
    assert f"{mean:.4f}".replace("-", "−") in markdown


def many(number, prompts, file):
    rows = tuple(
        ImageScore(str(file), f"prompt {p}", "a cat", f"0:{i}", {"clip_t": 0.1 * p, "dino_i": 0.5})
        for p in range(prompts)
        for i in range(4)
    )
    return [RunScores(f"run {i}", Scores(rows, summarize(rows, 99))) for i in range(number)]


@pytest.mark.parametrize(("runs", "prompts", "most"), mostly_slow([(1, 1, 160), (3, 30, 40), (5, 2, 4)], (5, 2, 4)))
def test_a_page_shows_a_bounded_number_of_images(runs, prompts, most, tmp_path):
    page = write_report(tmp_path, many(runs, prompts, REFERENCES / "00.png"), "Many", ["A note."], max_images=most)
    shown = page.read_text().count("<img")
    assert 0 < shown <= max(most, runs)
    assert "A note." in page.read_text()


@pytest.mark.parametrize("series", [2, 7, 24])
def test_the_planes_legend_lies_within_the_figure_and_leaves_room_for_the_plot(series):
    names = [f"custom-diffusion-steps={n:03}-learning_rate=0.0005" for n in range(series)]
    summary = {"clip_t": Interval(0.5, 0.4, 0.6, 9), "dino_i": Interval(0.5, 0.4, 0.6, 9)}
    figure = fidelity_editability_plane([RunScores(name, Scores((), summary), name) for name in names])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    width, height = figure.bbox.size
    assert min(legend.x0, legend.y0, width - legend.x1, height - legend.y1) >= 0
    assert figure.axes[0].get_window_extent().height > 2.5 * figure.dpi
    assert len(figure.legends[0].get_texts()) == series


def test_the_plane_shows_the_means_of_every_run():
    runs = many(2, 3, REFERENCES / "00.png")
    figure = fidelity_editability_plane([*runs, RunScores("empty", Scores((), {}))])
    points = [line.get_xydata()[0].tolist() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert points == [pytest.approx([0.1, 0.5])] * 2
    svg = inline_svg(figure, 'a "plane"')
    assert svg.startswith('<svg role="img" aria-label="a &quot;plane&quot;"')
    assert "http" not in svg
    assert svg == inline_svg(fidelity_editability_plane(runs), 'a "plane"')
