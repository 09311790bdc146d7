"""Steps, rates and DCI settings by one rule: what is tried, what is chosen, and that the suite has it."""

import json

import pytest
from helpers import ROOT, run_main

from dci.evaluation.bootstrap import Interval
from dci.evaluation.scores import RunScores, Scores
from dci.experiments.choice import as_file, choose
from dci.experiments.comparison import PooledRun
from dci.experiments.grid import MethodEntry, grid_points
from dci.experiments.suite import load_suite
from ldm.errors import UserError

SUITES = ROOT / "configs/eval"
CHOSEN = ROOT / "docs/results-tiny/choice/chosen.json"


def methods_of(suite):
    return {family: [m for m in suite.methods if m.family == family] for family in {m.family for m in suite.methods}}


def test_every_method_has_as_much_to_choose_from(tmp_path):
    choice = load_suite(SUITES / "tiny-choice.yaml", [f"outdir={tmp_path}"])
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}"])
    assert not {c.name for c in suite.concepts} & {c.name for c in choice.concepts}
    families = methods_of(choice)
    assert families.keys() == {m.name for m in suite.methods if not m.name.endswith("-regularized")}
    assert {len(variants) for variants in families.values()} == {4}
    assert [s.name for s in choice.settings] == ["plain", "dci-agg_time=0.3", "dci-agg_time=0.5", "dci-agg_time=0.7"]
    first = grid_points(load_suite(SUITES / "tiny-choice.yaml", [f"outdir={tmp_path}", "dataset.first=1"]))
    trained = {point.method: point.training.config for point in first}
    for variants in families.values():  # they differ, and within the same bounds
        steps = [trained[variant.name].training.steps for variant in variants]
        assert sorted(steps) == [100, 100, 200, 200]
        assert len({repr(trained[variant.name]) for variant in variants}) == 4


def test_variants_are_named_after_their_values(tmp_path):
    choice = load_suite(SUITES / "tiny-choice.yaml", [f"outdir={tmp_path}"])
    first = next(method for method in choice.methods if method.family == "ico")
    assert first.name == "ico-steps=100-learning_rate=0.0005"
    assert first.training == ["training.steps=100", "training.learning_rate=0.0005"]
    with pytest.raises(UserError, match="vary has an option without values"):
        load_suite(
            SUITES / "tiny.yaml", [f"outdir={tmp_path}", "methods=[{name: a, config: b, vary: {training.steps: []}}]"]
        )


def test_a_method_has_settings_of_its_own(tmp_path):
    entry = "{name: NAME, config: configs/train/ico-tiny.yaml, sampling: {dci: {agg_time: TIME}}}"
    methods = [entry.replace("NAME", name).replace("TIME", time) for name, time in (("a", "0.1"), ("b", "0.9"))]
    given = [f"outdir={tmp_path}", "dataset.first=1"]
    points = grid_points(load_suite(SUITES / "tiny.yaml", [*given, f"methods=[{', '.join(methods)}]"]))
    assert [(p.method, p.setting, p.task.sampling.agg_time) for p in points] == [
        ("a", "plain", None),
        ("a", "dci", 0.1),
        ("b", "plain", None),
        ("b", "dci", 0.9),
    ]
    assert points[1].sampling == {"agg_time": 0.1}
    with pytest.raises(UserError, match="sampling of 'dcy': expected one of plain, dci"):
        load_suite(SUITES / "tiny.yaml", [*given, f"methods=[{methods[0].replace('dci:', 'dcy:')}]"])


def run(method, fidelity, editability, **sampling):
    summary = {"dino_i": Interval(fidelity, 0, 1, 9), "clip_t": Interval(editability, 0, 1, 9)}
    return PooledRun(RunScores(f"{method}, x", Scores((), summary), series=method), sampling)


def entries(*names):
    return [MethodEntry(name, "c", training=[f"training.steps={name[-1]}"], family=name[0]) for name in names]


def test_the_rule_adds_both_axes_in_their_own_units():
    """Editability has a tenth of fidelity's spread here, so a tenth of the gain outweighs it."""
    runs = [
        run("a1", 0.9, 0.30, no_dci=True),
        run("a1", 0.5, 0.36, agg_time=0.3),
        run("a1", 0.9, 0.33, agg_time=0.7),
        run("a2", 0.5, 0.31, no_dci=True),  # less of fidelity than it gains of editability
        run("a2", 0.9, 0.40, agg_time=0.3),  # better, but the training is chosen first
        run("b1", 0.1, 0.37, no_dci=True),
        run("b1", 0.1, 0.30, agg_time=0.5),
    ]
    first, second = choose(runs, entries("a1", "a2", "b1"))
    assert (first.method, first.training, first.sampling) == ("a", ["training.steps=1"], {"agg_time": 0.7})
    assert (first.variants, first.settings, first.fidelity) == (2, 2, 0.9)
    assert second.training == ["training.steps=1"]
    assert (
        first.entry("f.yaml")
        == "- {name: a, config: f.yaml, training: [training.steps=1], sampling: {dci: {agg_time: 0.7}}}"
    )
    assert json.loads(as_file([first, second]))["methods"]["a"]["sampling"] == {"agg_time": 0.7}


def test_what_cannot_be_chosen_from():
    plain = [run("a1", 0.9, 0.3, no_dci=True), run("a2", 0.8, 0.4, no_dci=True)]
    with pytest.raises(UserError, match="a: no run with DCI"):
        choose(plain, entries("a1", "a2"))
    with pytest.raises(UserError, match="nothing to choose by"):
        choose([run("a1", 0.9, 0.3, no_dci=True)] * 2, entries("a1"))
    with pytest.raises(UserError, match="no run without DCI"):
        choose([run("a1", 0.9, 0.3)], entries("a1"))


def test_the_tiny_suites_have_what_was_chosen(tmp_path):
    chosen = json.loads(CHOSEN.read_text())["methods"]
    suite = load_suite(SUITES / "tiny.yaml", [f"outdir={tmp_path}"])
    for method in suite.methods:
        choice = chosen[method.name.removesuffix("-regularized")]
        assert set(choice["training"]) <= set(method.training), method.name
        assert method.sampling["dci"] == choice["sampling"], method.name
    ablations = load_suite(SUITES / "tiny-ablations.yaml", [f"outdir={tmp_path}"])
    for method in ablations.methods:
        assert set(chosen[method.name]["training"]) <= set(method.training), method.name
        assert {s.name: s.sampling for s in ablations.settings}["dci"] == chosen[method.name]["sampling"]


@pytest.mark.slow
@pytest.mark.parametrize("only", [None, "cat/*"])
def test_dci_is_only_sampled_with_the_trainings_that_were_chosen(tmp_path, monkeypatch, capfd, only):
    """The launcher is a stand-in that scores each cell; a higher rate is better here."""
    worked = []

    def launch(suite, points, report):
        worked.append([(point.concept, point.method, point.setting) for point in points])
        for point in points:
            values = {"dino_i": 0.5 + point.method.endswith("0.001"), "clip_t": 0.1 + 0.2 * point.method.endswith("0.001")}
            rows = [{"file": "f", "prompt": "p", "text": "p", "noise": "0:0", "values": values}]
            point.folder.mkdir(parents=True)
            point.result.write_text(json.dumps({"rows": rows, "summary": {}, "metadata": {}}))

    monkeypatch.setattr("dci.experiments.launchers.launch", launch)
    monkeypatch.setattr("dci.experiments.aggregate.write_grid_report", lambda done, outdir, *_: outdir)
    vary = "{training.steps: [100], training.learning_rate: [0.0005, 0.001]}"
    method = f"{{name: ico, config: {ROOT}/configs/train/ico-tiny.yaml, vary: {vary}}}"
    command = ("sweep.py", "--config", SUITES / "tiny-choice.yaml", "--choose", f"outdir={tmp_path}", f"methods=[{method}]")
    run_main(*command, *(("--only", only) if only else ()))
    concepts = {"cat"} if only else {"cat", "car"}
    names = ["ico-steps=100-learning_rate=0.0005", "ico-steps=100-learning_rate=0.001"]
    plain, dci = worked
    assert set(plain) == {(concept, name, "plain") for concept in concepts for name in names}
    assert set(dci) == {(concept, names[1], f"dci-agg_time={t}") for concept in concepts for t in (0.3, 0.5, 0.7)}
    chosen = json.loads((tmp_path / "tiny-choice/report/chosen.json").read_text())["methods"]["ico"]
    assert chosen["training"] == ["training.steps=100", "training.learning_rate=0.001"]
    worked.clear()
    run_main(*command, *(("--only", only) if only else ()))
    assert worked == [[], []]  # nothing is done again
    assert "Chosen by the highest fidelity" in capfd.readouterr().out
