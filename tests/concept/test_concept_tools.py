"""Merging against SciPy, low-rank files, inspection, and one concept at a time."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import ROOT, mostly_slow, ok, refused, run, run_here, run_main
from safetensors.torch import save_file

from dci.concept.concept_file import Concept
from dci.concept.inspection import inspect_tokens, short_name, weight_changes
from dci.concept.low_rank import compress
from dci.concept.merging import constrained_solution, merge
from dci.finetuning.config import ConceptConfig, FinetuneConfig, TrainingConfig
from dci.finetuning.module import ICOTraining
from ldm import tokenizer
from ldm.checkpoint import fingerprint, read_safetensors
from ldm.errors import UserError

KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CAPTIONS = (ROOT / "data/captions.txt").read_text().splitlines()


def learned(base, noun, words, seed, **training):
    """A concept whose weights and tokens are moved at random."""
    torch.manual_seed(seed)
    options = FinetuneConfig(concept=ConceptConfig(noun, words), training=TrainingConfig(**training))
    module = ICOTraining(copy.deepcopy(base), options, images=2)
    for parameter in module.trained().values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module.concept()


@pytest.fixture(scope="module")
def two(tiny_base):
    return [learned(tiny_base, "dog", ["ktn", "pll"], 1), learned(tiny_base, "red car", ["ucd"], 2)]


@pytest.fixture(scope="module")
def thin(tiny_base, two):
    return [compress(concept, tiny_base, rank=2).concept for concept in two]


def contexts(model, prompts, extra):
    """Text contexts of token ids, in float64: (n, 77, d)."""
    text = model.text_encoder
    with torch.no_grad():
        return text.encode(text.embed(torch.tensor([tokenizer.frame(ids) for ids in prompts]), extra)).double().numpy()


DAMAGES = {
    "modifier_tokens holds": lambda tensors, facts: tensors["modifier_tokens"].fill_(float("nan")),
    "to_k.weight holds": lambda tensors, facts: tensors.update({KEY: tensors[KEY].to(torch.float8_e4m3fn)}),
    "damaged concept file .'contexts.prefix'": lambda tensors, facts: tensors.pop("contexts.prefix"),
    "modifier_tokens is .3, 128., expected 2 rows": lambda tensors, facts: tensors.update(
        modifier_tokens=torch.zeros(3, 128)
    ),
    "contexts of another shape": lambda tensors, facts: tensors.update({"contexts.suffix": torch.zeros(2)}),
    "the factors of a do not go": lambda tensors, facts: tensors.update({"a.u": torch.ones(2, 2), "a.v": torch.ones(3, 2)}),
    "damaged concept file .'base'": lambda tensors, facts: facts.pop("base"),
    "damaged concept file .Expecting": lambda tensors, facts: facts.update(config="{"),
    "damaged concept file .'int'": lambda tensors, facts: facts.update(modifier_tokens="3"),
    "does not fit .*: modifier_tokens, 7 wide": lambda tensors, facts: tensors.update(modifier_tokens=torch.zeros(2, 7)),
    "does not fit .*: no.such": lambda tensors, facts: tensors.update({"no.such": torch.zeros(1)}),
    "does not fit .*to_k.weight": lambda tensors, facts: tensors.update({KEY: torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damaged_concept_files_are_named_in_one_line(tiny_base, two, tmp_path, words):
    file = tmp_path / "c.safetensors"
    two[0].save(file)
    tensors, facts = read_safetensors(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    DAMAGES[words](tensors, facts)
    save_file(tensors, file, facts)
    with pytest.raises(UserError, match=words) as error:
        Concept.load(file).apply(tiny_base)
    assert "\n" not in str(error.value)


def test_a_concept_is_compressed_and_inspected_against_its_own_base_alone(tiny_base, two):
    import dataclasses

    other = dataclasses.replace(two[0], base="0" * 16)
    for look in (lambda: compress(other, tiny_base, rank=2), lambda: inspect_tokens(other, tiny_base)):
        with pytest.raises(UserError, match="learned on the base model 'tiny'"):
            look()


@pytest.mark.slow
def test_merging_equals_the_karush_kuhn_tucker_system_solved_by_scipy(tiny_base, two, tmp_path):
    """min |W C_reg^T - W_0 C_reg^T| with W C^T = V, from its own equations, in float64."""
    merged = merge(two, tiny_base, CAPTIONS)
    first, before = tokenizer.VOCAB_SIZE, tokenizer.tokenize("photo of a")
    dog = [first, first + 1, *tokenizer.tokenize("dog")]
    car = [first, *tokenizer.tokenize("red car")]
    rows = [
        contexts(tiny_base, [[*before, *named]], concept.modifiers)[0, 4 : 4 + len(named)]
        for named, concept in zip((dog, car), two, strict=True)
    ]
    c = np.concatenate(rows)
    c_reg = contexts(tiny_base, [tokenizer.tokenize(x) for x in CAPTIONS], two[0].modifiers).reshape(-1, 128)
    gram, n = c_reg.T @ c_reg, len(c)
    system = np.block([[gram, c.T], [c, np.zeros((n, n))]])

    base, merged_weights = tiny_base.state_dict(), merged.concept.weights(tiny_base)
    assert len(merged_weights) == sum(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in base)
    for name, weight in merged_weights.items():
        w_0 = base[name].double().numpy()
        values = np.concatenate([r @ k.keys_values[name].double().numpy().T for r, k in zip(rows, two, strict=True)])
        right = np.concatenate([gram @ w_0.T, values])
        expected = scipy.linalg.solve(system, right, assume_a="sym")[:128].T
        assert np.abs(weight.double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
        # Every target word has the keys and values of its own fine-tuning.
        assert np.abs(c @ weight.double().numpy().T - values).max() <= 1e-5 * np.abs(values).max()
    assert merged.kept < 1e-6
    merged.concept.save(tmp_path / "c.safetensors")
    loaded = Concept.load(tmp_path / "c.safetensors")
    assert loaded.names == ((("<new1>", "<new2>"), "dog"), (("<new3>",), "red car"))
    assert torch.equal(loaded.modifiers, torch.cat([concept.modifiers for concept in two]))
    assert all(torch.equal(weight, merged_weights[name]) for name, weight in loaded.weights(tiny_base).items())


def test_few_captions_leave_no_unique_answer_but_the_words_are_kept():
    torch.manual_seed(0)
    targets, captions = torch.randn(4, 30).double(), torch.randn(12, 30).double()
    wanted = torch.randn(4, 7).double()
    change = constrained_solution(targets, captions) @ wanted
    torch.testing.assert_close(targets @ change, wanted)
    # 26 free directions suffice to leave 12 captions as they are.
    assert (captions @ change).abs().max() < 1e-9
    # A word that comes twice asks for the same twice.
    twice = constrained_solution(targets[[0, 1, 0]], captions)
    torch.testing.assert_close(targets[[0, 1]] @ twice @ wanted[[0, 1, 0]], wanted[[0, 1]])


def test_what_cannot_be_merged_is_refused(tiny_base, two):
    with pytest.raises(UserError, match="give two or more"):
        merge(two[:1], tiny_base, CAPTIONS)
    with pytest.raises(UserError, match="training.trainable=crossattn-kv"):
        merge([two[0], learned(tiny_base, "dog", ["ktn"], 1, trainable="crossattn")], tiny_base, CAPTIONS)
    with pytest.raises(UserError, match="no captions"):
        merge(two, tiny_base, [])


@pytest.mark.slow
def test_concepts_of_tokens_alone_are_merged_without_a_change_of_weights(tiny_base):
    concepts = [learned(tiny_base, noun, ["ktn"], i, trainable="none") for i, noun in enumerate(("dog", "cat"))]
    merged = merge(concepts, tiny_base, CAPTIONS[:2])
    assert (merged.changed, merged.concept.weights(tiny_base)) == (0, {})
    assert torch.equal(merged.concept.modifiers, torch.cat([concept.modifiers for concept in concepts]))


def test_low_rank_changes_are_the_best_of_their_rank(tiny_base, two, tmp_path):
    base = tiny_base.state_dict()
    small = compress(two[0], tiny_base, rank=5)
    wrong = total = 0
    for name, weight in two[0].keys_values.items():
        change = (weight.float() - base[name]).double().numpy()
        values = np.linalg.svd(change, compute_uv=False)
        wrong, total = wrong + (values[5:] ** 2).sum(), total + (values**2).sum()
        assert small.concept.low_rank[name].u.dtype == torch.float16
    assert small.error == pytest.approx((wrong / total) ** 0.5, rel=1e-3)
    # Rank 128 is everything, up to fp16.
    assert compress(two[0], tiny_base, rank=128).error < 1e-3
    # An energy keeps its share, with the smallest rank that does.
    by_energy = compress(two[0], tiny_base, energy=0.8)
    assert by_energy.error <= 0.2**0.5 + 1e-3
    for name, rank in by_energy.ranks.items():
        values = np.linalg.svd((two[0].keys_values[name].float() - base[name]).numpy(), compute_uv=False) ** 2
        assert values[: rank - 1].sum() < 0.8 * values.sum() <= values[:rank].sum() * (1 + 1e-6)
    with pytest.raises(UserError, match="over the limit of 0.01 MB"):
        compress(two[0], tiny_base, rank=64, most_megabytes=0.01)
    # The limit is the file's, whose tokens and contexts take room too.
    small.concept.save(tmp_path / "small.safetensors")
    assert 0 < (tmp_path / "small.safetensors").stat().st_size / 1e6 - small.megabytes < 0.02


def test_a_low_rank_file_is_applied_like_a_whole_one(tiny, two, tmp_path):
    compress(two[0], tiny, rank=128).concept.save(tmp_path / "small.safetensors")
    small = Concept.load(tmp_path / "small.safetensors")
    assert not small.keys_values
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    undo = small.apply(tiny)
    for name, weight in two[0].keys_values.items():
        torch.testing.assert_close(tiny.state_dict()[name], weight.float(), rtol=0, atol=1e-4)
    undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


@pytest.mark.parametrize("dtype", mostly_slow([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("first", ["whole", "low rank", "tokens alone"])
@pytest.mark.parametrize("second", mostly_slow(["itself", "another", "another of low rank"], "another of low rank"))
def test_one_concept_at_a_time(tiny_base, two, thin, dtype, first, second):
    """Models of half precision know their file's fingerprint, whatever is done to their weights."""
    whole, other = two
    one = {"whole": whole, "low rank": thin[0], "tokens alone": dataclasses.replace(whole, keys_values={})}[first]
    two_ = {"itself": one, "another": other, "another of low rank": thin[1]}[second]
    model = copy.deepcopy(tiny_base)
    model.loaded_fingerprint = fingerprint(tiny_base)  # as of a model that was rounded in loading
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = one.apply(model)
    applied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for what in (
        two_.apply,
        two_.replaced,
        two_.check_base,
        lambda model: compress(two_, model, rank=2),
        lambda model: merge([two_, other], model, CAPTIONS[:2]),
    ):
        with pytest.raises(UserError, match="concept <new1> <new2> dog applied"):
            what(model)
    assert all(torch.equal(tensor, applied[name]) for name, tensor in model.state_dict().items())
    undo()
    undo_second = two_.apply(model)
    undo()  # has been done: nothing happens
    assert model.applied == two_.describe()
    undo_second()
    assert model.applied is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_inspection_finds_the_words_and_the_layers(tiny_base, two):
    table = tiny_base.text_encoder.token_table
    (cat,) = tokenizer.tokenize("cat")
    concept = learned(tiny_base, "dog", ["ktn", "pll"], 1)
    concept.modifiers[0] = 3 * table[cat]
    token, *_ = inspect_tokens(concept, tiny_base, nearest=3)
    assert (token.name, token.nearest[0].word) == ("<new1>", "cat")
    assert token.nearest[0].cosine == pytest.approx(1)
    assert token.norm == pytest.approx(3 * table[cat].norm().item())
    assert len(inspect_tokens(concept, tiny_base)) == 2 + 2 * (3 + 1)
    changes = weight_changes(two[0], tiny_base)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    before = tiny_base.state_dict()[name]
    assert changes[name] == pytest.approx(((two[0].keys_values[name].float() - before).norm() / before.norm()).item())
    assert [short_name(n) for n in changes][:3] == ["input 1", "input 1", "input 3"]
    assert short_name("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight") == "middle"


@pytest.mark.slow
def test_the_programs(two, tmp_path, capfd):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for concept, file in zip(two, files, strict=True):
        concept.save(file)
    out = ok(run("merge_concepts.py", *files, "--out", tmp_path / "c.safetensors"))
    assert "<new3> red car" in out
    assert (tmp_path / "c.safetensors").stat().st_size < files[0].stat().st_size
    refused(run_here(capfd, "merge_concepts.py", files[0], "--out", tmp_path / "d"), "two or more")
    refused(
        run_here(capfd, "merge_concepts.py", files[0], files[0], "--out", tmp_path / "d"), "are the same", "give each once"
    )
    merging = f"dci merge {files[0]} {files[1]} --out"
    refused(run_here(capfd, "sample_dci.py", "--concept", *files, "--prompt", "a V1*"), "merge them first", merging)
    refused(run_here(capfd, "import_concept.py", files[0], "--out", tmp_path / "d"), "is a concept file already")
    run_main("compress_concept.py", files[0], "--rank", 4, "--out", tmp_path / "small.safetensors")
    assert re.search(r"rank 4, 0\.0\d MB; reconstruction error 0\.\d+", capfd.readouterr().out)
    refused(run_here(capfd, "compress_concept.py", files[0], "--out", tmp_path / "x"), "--rank or --energy")
    refused(run_here(capfd, "compress_concept.py", files[0], "--energy", 2, "--out", tmp_path / "x"), "--energy 2.0")
    run_main("inspect_concept.py", tmp_path / "small.safetensors", "--plot", tmp_path / "plot.png", "--nearest", 2)
    out = capfd.readouterr().out
    assert re.search(r"<new2> +length \d\.\d+ +near: \S+ -?\d", out)
    assert re.search(r"middle +to_v +changed by 0\.\d+", out)
    assert (tmp_path / "plot.png").stat().st_size > 5000
    for name in ("plot.txt", "plot"):
        late = run_here(capfd, "inspect_concept.py", files[0], "--plot", tmp_path / name)
        refused(late, f"{name}: expected", ".png")
        assert not late.stdout
    (tmp_path / "latin.txt").write_bytes("ein schönes Haus\n".encode("latin-1"))
    run_main("merge_concepts.py", *files, "--captions", tmp_path / "latin.txt", "--out", tmp_path / "d.safetensors")


@pytest.mark.slow
def test_a_plot_has_a_bar_for_every_weight_that_was_trained(tiny_base, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars = {}
    monkeypatch.setattr(Axes, "bar", lambda self, x, heights, *args, label, **options: bars.update({label: heights}))
    monkeypatch.setattr(Axes, "legend", lambda self: None)
    learned(tiny_base, "dog", ["ktn"], 1, trainable="crossattn").save(tmp_path / "all.safetensors")
    run_main(
        "inspect_concept.py", tmp_path / "all.safetensors", "--no-contexts", "--nearest", 10**6, "--plot", tmp_path / "a.png"
    )
    assert set(bars) == {"to_q", "to_k", "to_v", "to_out.0", "to_out.0.bias"}
    assert all(height > 0 for heights in bars.values() for height in heights)


def test_a_concept_of_tokens_alone_has_nothing_to_plot(tiny_base, tmp_path, capfd):
    learned(tiny_base, "dog", ["ktn"], 1, trainable="none").save(tmp_path / "tokens.safetensors")
    run_main("inspect_concept.py", tmp_path / "tokens.safetensors", "--plot", tmp_path / "a.png")
    assert "No plot" in capfd.readouterr().out
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("number", [None, "1", "2", "3", "x"])
def test_the_number_of_the_format_decides_who_can_read_a_file(number, finetuned, tmp_path):
    file = tmp_path / "concept.safetensors"
    finetuned[1].save(file)
    tensors, metadata = read_safetensors(file)
    assert metadata.pop("format_version") == "1"
    save_file(tensors, file, metadata | ({} if number is None else {"format_version": number}))
    if number in (None, "1", "2"):
        assert Concept.load(file).class_noun == finetuned[1].class_noun
    else:
        with pytest.raises(UserError, match=f"of format {number}: .* reads up to 2; update the package dci"):
            Concept.load(file)
