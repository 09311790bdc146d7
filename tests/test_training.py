"""ICO: what is trained and what is not, where the learned embeddings stand, the concept file."""

import dataclasses

import pytest
import torch
from PIL import Image

from dci.concept import Concept
from dci.config import ConceptConfig, ContextConfig, FinetuneConfig, TrainingConfig
from dci.context import initial_contexts
from dci.data import REGULARIZATION, ConceptBatch, ConceptDataset, HalfAndHalf
from dci.training import ICOTraining, attend_first_detached
from ldm import tokenizer
from ldm.attention import attend
from ldm.checkpoint import fingerprint
from ldm.errors import UserError

KEYS_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")


def config(**options):
    return FinetuneConfig(concept=ConceptConfig(class_noun="dog", initial_words=["ktn", "pll"]), **options)


def batch(pictures, caption="a photo of a dog"):
    ids = torch.tensor([tokenizer.frame(tokenizer.tokenize(caption))] * len(pictures))
    return ConceptBatch(torch.randn(len(pictures), 2, 8, 16, 16) - 1, pictures, ids)


def gradients(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_gradients_reach_keys_values_modifiers_and_the_batchs_contexts_alone(tiny):
    module = ICOTraining(tiny, config(), pictures=5)
    module.loss(batch([1, 3, 3, REGULARIZATION])).backward()
    expected = {n for n, _ in module.named_parameters() if n.endswith(KEYS_VALUES)}
    assert len(expected) == 2 * sum(name.endswith("attn2.to_q.weight") for name, _ in tiny.named_parameters())
    expected |= {"learned.modifiers"} | {f"learned.{part}.{i}" for part in ("prefixes", "suffixes") for i in (1, 3)}
    assert gradients(module) == expected
    # Every modifier token is reached, not only the first or the last.
    assert (module.learned.modifiers.grad.abs().amax(dim=1) > 0).all()


def test_a_step_changes_what_the_batch_reaches_and_nothing_else(tiny):
    module = ICOTraining(tiny, config(), pictures=3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = module.configure_optimizers()
    module.loss(batch([0, REGULARIZATION])).backward()
    optimizer.step()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    learned = {"learned.modifiers", "learned.prefixes.0", "learned.suffixes.0"}
    assert changed == learned | {n for n in before if n.endswith(KEYS_VALUES)}


def test_regularization_alone_reaches_keys_and_values_alone(tiny):
    module = ICOTraining(tiny, config(), pictures=2)
    module.loss(batch([REGULARIZATION, REGULARIZATION])).backward()
    assert all(name.endswith(KEYS_VALUES) for name in gradients(module))


def test_rates_are_absolute_and_contexts_have_their_own(tiny):
    training = TrainingConfig(learning_rate=2e-4, context_learning_rate=3e-3, batch_size=8, weight_decay=0.02)
    module = ICOTraining(tiny, config(training=training), pictures=4)
    main, modifiers, contexts = module.configure_optimizers().param_groups
    assert (main["lr"], modifiers["lr"], contexts["lr"], main["weight_decay"]) == (2e-4, 2e-4, 3e-3, 0.02)
    training.modifier_learning_rate = 1e-3
    assert module.configure_optimizers().param_groups[1]["lr"] == 1e-3
    assert {id(p) for p in contexts["params"]} == {id(p) for p in module.learned.context_parameters()}
    assert len(contexts["params"]) == 8
    trained = {id(p) for group in (main, modifiers, contexts) for p in group["params"]}
    assert trained == {id(p) for p in module.parameters() if p.requires_grad}


def test_first_token_is_detached():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    out = attend_first_detached(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v))
    out.square().sum().backward()
    for y in (k, v):
        assert (y.grad[:, :, 0] == 0).all()
        assert (y.grad[:, :, 1:].abs().amax(dim=-1) > 0).all()
    assert (q.grad != 0).any()


def test_learned_embeddings_stand_at_their_true_positions(tiny):
    """The learned prompt, started from "photo of a ... .", equals the same prompt written as text."""
    module = ICOTraining(tiny, config(), pictures=2)
    learned = module.contexts(batch([0, 1]))
    text = tiny.text_encoder
    with torch.no_grad():
        ids = [*tokenizer.tokenize("photo of a"), 42170, 47629, *tokenizer.tokenize("dog .")]
        written = text.encode(text.embed(torch.tensor([tokenizer.frame(ids)])))
    torch.testing.assert_close(learned, written.expand(2, -1, -1))


def test_captions_of_regularization_pictures_are_read_as_text(tiny):
    module = ICOTraining(tiny, config(), pictures=1)
    contexts = module.contexts(batch([0, REGULARIZATION], "a dog in the snow"))
    torch.testing.assert_close(contexts[1:], tiny.text_encoder(["a dog in the snow"]))


def test_contexts_without_text_are_random_and_differ_between_pictures(tiny_base):
    options = ContextConfig(prefix=None, suffix=None, prefix_length=4, suffix_length=2)
    prefixes, suffixes = initial_contexts(options, 50, tiny_base.text_encoder, torch.Generator().manual_seed(0))
    assert prefixes.shape == (50, 4, 128)
    assert suffixes.shape == (50, 2, 128)
    assert not torch.equal(prefixes[0], prefixes[1])
    assert abs(prefixes.std().item() - 0.02) < 0.001


def test_too_long_contexts(tiny):
    with pytest.raises(UserError, match="shorten the contexts"):
        ICOTraining(tiny, config(context=ContextConfig(prefix="very " * 80)), pictures=1)


def pictures_folder(folder, number, captions=False):
    folder.mkdir()
    for i in range(number):
        Image.new("RGB", (80, 70), (40 * i, 90, 10)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"a dog number {i}")
    return folder


def test_batches_are_half_and_half_and_go_through_all_pictures(tiny, tmp_path):
    references = pictures_folder(tmp_path / "references", 3)
    others = pictures_folder(tmp_path / "class", 5, captions=True)
    dataset = ConceptDataset(tiny, references, others)
    assert dataset.moments.shape == (8, 2, 8, 16, 16)
    batches = list(HalfAndHalf(dataset, 6, 10, torch.Generator().manual_seed(0)))
    assert len(batches) == 10
    for items in batches:
        assert sorted(items[:3]) == [0, 1, 2]
        assert all(3 <= item < 8 for item in items[3:])
    fetched = dataset.__getitems__(batches[0])
    assert fetched.pictures == [*batches[0][:3], REGULARIZATION, REGULARIZATION, REGULARIZATION]
    (others / "2.txt").unlink()
    with pytest.raises(UserError, match="2.txt"):
        ConceptDataset(tiny, references, others)


def test_mirrored_latents_are_those_of_the_mirrored_picture(tiny, tmp_path):
    folder = pictures_folder(tmp_path / "a", 1)
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    picture.save(folder / "0.png")
    dataset = ConceptDataset(tiny, folder)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "0.png")
    mirrored = ConceptDataset(tiny, folder)
    torch.testing.assert_close(dataset.moments[0, 0], mirrored.moments[0, 1])


def test_concept_file_round_trip(tiny, tmp_path):
    module = ICOTraining(tiny, config(), pictures=3)
    base = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn_like(parameter)
    learned = module.concept()
    learned.save(tmp_path / "deep" / "concept.safetensors")
    loaded = Concept.load(tmp_path / "deep" / "concept.safetensors")
    for field in dataclasses.fields(Concept):
        ours, theirs = getattr(learned, field.name), getattr(loaded, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
        elif field.name == "keys_values":
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert ours == theirs
    assert loaded.config["concept"]["class_noun"] == "dog"

    tiny.load_state_dict(base)
    undo = loaded.apply(tiny)
    changed = {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, base[name])}
    assert changed == set(loaded.keys_values)
    undo()
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.state_dict().items())


def test_a_concept_of_another_base_is_refused(tiny, tmp_path):
    concept = ICOTraining(tiny, config(), pictures=1).concept()
    known = fingerprint(tiny)
    with torch.no_grad():
        next(p for n, p in tiny.named_parameters() if n.endswith(KEYS_VALUES)).add_(0.5)
    assert fingerprint(tiny) != known
    with pytest.raises(UserError, match="learned on the base model 'tiny'"):
        concept.apply(tiny)


def test_a_file_that_is_no_concept(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a concept file"):
        Concept.load(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_text("hello")
    with pytest.raises(UserError, match="not a whole"):
        Concept.load(tmp_path / "y.safetensors")
