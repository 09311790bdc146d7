"""ICO: what is trained and what is not, where the learned embeddings stand, the concept file."""

import dataclasses

import pytest
import torch
from helpers import mostly_slow
from PIL import Image

from dci.concept.concept_file import Concept
from dci.finetuning.config import ConceptConfig, ContextConfig, DataConfig, FinetuneConfig, TrainingConfig
from dci.finetuning.dataset import REGULARIZATION, BatchOrder, BatchSlot, ConceptBatch, ConceptDataset
from dci.finetuning.images import read_references, read_regularization
from dci.finetuning.learned_prompts import initial_contexts
from dci.finetuning.module import ICOTraining, attend_first_detached
from ldm import tokenizer
from ldm.attention import attend
from ldm.checkpoint import fingerprint
from ldm.errors import UserError

KEYS_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")


def config(**options):
    return FinetuneConfig(concept=ConceptConfig(class_noun="dog", initial_words=["ktn", "pll"]), **options)


def batch(images, caption="a photo of a dog"):
    b = len(images)
    ids = torch.tensor([tokenizer.frame(tokenizer.tokenize(caption))] * b)
    noise, posterior_noise = torch.randn(2, b, 4, 16, 16)
    return ConceptBatch(
        images,
        [""] * b,
        ids,
        torch.empty(0, 3, 64, 64),
        torch.randn(b, 8, 16, 16) - 1,
        None,
        torch.randint(1000, (b,)),
        noise,
        posterior_noise,
    )


def gradients(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_gradients_reach_keys_values_modifiers_and_the_batchs_contexts_alone(tiny):
    module = ICOTraining(tiny, config(), images=5)
    module.loss(batch([1, 3, 3, REGULARIZATION])).backward()
    expected = {n for n, _ in module.named_parameters() if n.endswith(KEYS_VALUES)}
    assert len(expected) == 2 * sum(name.endswith("attn2.to_q.weight") for name, _ in tiny.named_parameters())
    expected |= {"learned.modifiers"} | {f"learned.{part}.{i}" for part in ("prefixes", "suffixes") for i in (1, 3)}
    assert gradients(module) == expected
    # Every modifier token is reached, not only the first or the last.
    assert (module.learned.modifiers.grad.abs().amax(dim=1) > 0).all()


def test_a_step_changes_what_the_batch_reaches_and_nothing_else(tiny):
    module = ICOTraining(tiny, config(), images=3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = module.configure_optimizers()
    module.loss(batch([0, REGULARIZATION])).backward()
    optimizer.step()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    learned = {"learned.modifiers", "learned.prefixes.0", "learned.suffixes.0"}
    assert changed == learned | {n for n in before if n.endswith(KEYS_VALUES)}


def test_regularization_alone_reaches_keys_and_values_alone(tiny):
    module = ICOTraining(tiny, config(), images=2)
    module.loss(batch([REGULARIZATION, REGULARIZATION])).backward()
    assert all(name.endswith(KEYS_VALUES) for name in gradients(module))


def test_rates_are_absolute_and_contexts_have_their_own(tiny):
    training = TrainingConfig(learning_rate=2e-4, context_learning_rate=3e-3, batch_size=8, weight_decay=0.02)
    module = ICOTraining(tiny, config(training=training), images=4)
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
    module = ICOTraining(tiny, config(), images=2)
    learned = module.contexts(batch([0, 1]))
    text = tiny.text_encoder
    with torch.no_grad():
        ids = [*tokenizer.tokenize("photo of a"), 42170, 47629, *tokenizer.tokenize("dog .")]
        written = text.encode(text.embed(torch.tensor([tokenizer.frame(ids)])))
    torch.testing.assert_close(learned, written.expand(2, -1, -1))


def test_captions_of_regularization_images_are_read_as_text(tiny):
    module = ICOTraining(tiny, config(), images=1)
    contexts = module.contexts(batch([0, REGULARIZATION], "a dog in the snow"))
    torch.testing.assert_close(contexts[1:], tiny.text_encoder(["a dog in the snow"]))


def test_contexts_without_text_are_random_and_differ_between_images(tiny_base):
    options = ContextConfig(prefix=None, suffix=None, prefix_length=4, suffix_length=2)
    prefixes, suffixes = initial_contexts(options, 50, tiny_base.text_encoder, torch.Generator().manual_seed(0))
    assert prefixes.shape == (50, 4, 128)
    assert suffixes.shape == (50, 2, 128)
    assert not torch.equal(prefixes[0], prefixes[1])
    assert abs(prefixes.std().item() - 0.02) < 0.001


def test_too_long_contexts(tiny):
    with pytest.raises(UserError, match="shorten the contexts"):
        ICOTraining(tiny, config(context=ContextConfig(prefix="very " * 80)), images=1)


def images_folder(folder, number, captions=False):
    folder.mkdir()
    for i in range(number):
        Image.new("RGB", (80, 70), (40 * i, 90, 10)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"a dog number {i}")
    return folder


def dataset_of(model, references, others=None, **options):
    data = DataConfig(str(references), **options)
    size = model.config.image_size
    regularization = read_regularization(others, data, size) if others else []
    return ConceptDataset(model, read_references(references, data, size), regularization, data)


def test_batches_are_half_and_half_and_go_through_all_images(tiny, tmp_path):
    references = images_folder(tmp_path / "references", 3)
    others = images_folder(tmp_path / "class", 5, captions=True)
    dataset = dataset_of(tiny, references, others)
    assert dataset.moments.shape == (8, 2, 8, 16, 16)
    steps = [[slot.item for slot in part] for (part,) in BatchOrder(3, 5, 6, range(10))]
    assert len(steps) == 10
    for items in steps:
        assert sorted(items[:3]) == [0, 1, 2]
        assert all(3 <= item < 8 for item in items[3:])
    # Five regularization images, three in a step: all of them before any comes again.
    seen = [item for items in steps for item in items[3:]]
    assert all(sorted(seen[i : i + 5]) == [3, 4, 5, 6, 7] for i in range(0, 30, 5))
    (fetched,) = dataset.__getitems__([BatchOrder(3, 5, 6, range(1)).step(0)])
    assert fetched.images == [*steps[0][:3], REGULARIZATION, REGULARIZATION, REGULARIZATION]
    (others / "2.txt").unlink()
    with pytest.raises(UserError, match="2.txt"):
        dataset_of(tiny, references, others)


def test_a_step_is_the_same_however_it_is_shared_out():
    """Micro-batches of a size are the same images in the same slots on 1, 2 and 4 processes."""
    whole = list(BatchOrder(5, 7, 16, range(3, 6), seed=1, micro_batches=8))
    assert {slot for part in whole[0] for slot in part} == set(BatchOrder(5, 7, 16, range(9), seed=1).step(3))
    for world in (2, 4):
        ranks = [list(BatchOrder(5, 7, 16, range(3, 6), 1, (rank, world), 8 // world)) for rank in range(world)]
        for step in range(3):
            assert {tuple(p) for rank in ranks for p in rank[step]} == {tuple(p) for p in whole[step]}
    # A resumed run makes the same steps that it would have made.
    assert whole == list(BatchOrder(5, 7, 16, range(6), seed=1, micro_batches=8))[3:]
    with pytest.raises(UserError, match="batch_size=6 cannot be shared evenly by 4 processes"):
        BatchOrder(5, 0, 6, range(1), process=(0, 4))


def test_a_rows_randomness_depends_on_its_step_and_slot_alone(tiny, tmp_path):
    folder = images_folder(tmp_path / "a", 3)
    Image.effect_noise((64, 64), 90).convert("RGB").save(folder / "0.png")
    dataset = dataset_of(tiny, folder)
    (whole,) = dataset.__getitems__([[BatchSlot(i % 3, 4, i) for i in range(6)]])
    (alone,) = dataset.__getitems__([[BatchSlot(1, 4, 4)]])
    (later,) = dataset.__getitems__([[BatchSlot(1, 5, 4)]])
    for name in ("noise", "posterior_noise", "moments", "t"):
        assert torch.equal(getattr(whole, name)[4:5], getattr(alone, name))
    assert not torch.equal(alone.noise, later.noise)
    # Slots draw their own numbers; timesteps cover their range, and half of the images are mirrored.
    assert len({row.sum().item() for row in whole.noise}) == 6
    (many,) = dataset.__getitems__([[BatchSlot(0, s, 0) for s in range(400)]])
    assert many.t.float().mean() == pytest.approx(500, abs=50)
    assert many.noise.std() == pytest.approx(1, abs=0.01)
    mirrored = (many.moments == dataset.moments[0, 1]).flatten(1).all(dim=1)
    straight = (many.moments == dataset.moments[0, 0]).flatten(1).all(dim=1)
    assert (mirrored | straight).all()
    assert 150 < mirrored.sum() < 250


def test_mirrored_latents_are_those_of_the_mirrored_image(tiny, tmp_path):
    folder = images_folder(tmp_path / "a", 1)
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    image.save(folder / "0.png")
    dataset = dataset_of(tiny, folder)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "0.png")
    mirrored = dataset_of(tiny, folder)
    torch.testing.assert_close(dataset.moments[0, 0], mirrored.moments[0, 1])


def test_cached_latents_are_those_that_are_encoded_anew(tiny, tmp_path):
    folder = images_folder(tmp_path / "a", 4)
    module = ICOTraining(tiny, config(), images=4)
    draws = [BatchSlot(i % 4, 2, i) for i in range(8)]
    cached, anew = (dataset_of(tiny, folder, cache_latents=c) for c in (None, False))
    assert "cached, 4 images" in cached.describe()
    assert "4 images are encoded anew" in anew.describe()
    batches = [d.__getitems__([draws])[0] for d in (cached, anew)]
    assert (len(batches[0].pixels), len(batches[1].moments)) == (0, 0)
    latents = [module.latents(batch) for batch in batches]
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="cache_latents=true does not go with"):
        dataset_of(tiny, folder, cache_latents=True, augment="random-resize")


def test_concept_file_round_trip(tiny, tmp_path):
    module = ICOTraining(tiny, config(), images=3)
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
    concept = ICOTraining(tiny, config(), images=1).concept()
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


@pytest.mark.parametrize("which", mostly_slow(["crossattn-kv", "crossattn", "none"], "crossattn"))
def test_trainable_sets(tiny, tmp_path, which):
    """Exactly the named weights change in a step, and the concept file brings exactly them."""
    expected = {
        "crossattn-kv": KEYS_VALUES,
        "crossattn": tuple(
            f".attn2.{n}" for n in ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
        ),
        "none": ("no such name",),
    }[which]
    module = ICOTraining(tiny, config(training=TrainingConfig(trainable=which)), images=1)
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    optimizer = module.configure_optimizers()
    module.loss(batch([0, REGULARIZATION])).backward()
    optimizer.step()
    changed = {name for name, p in tiny.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(expected)}
    module.concept().save(tmp_path / "c.safetensors")
    assert set(Concept.load(tmp_path / "c.safetensors").keys_values) == changed


def test_every_modifier_token_must_have_been_trained(tiny):
    module = ICOTraining(tiny, config(), images=1)
    with pytest.raises(UserError, match="has not reached <new1>, <new2>"):
        module.check_trained()
    module.reached[0] = True
    with pytest.raises(UserError, match="has not reached <new2>"):
        module.check_trained()


def test_rates_scale_with_reference_images_only_when_asked_to(tiny):
    training = TrainingConfig(learning_rate=1e-5, context_learning_rate=1e-4, batch_size=12)
    options = config(training=training, data=DataConfig("x", regularization="y"))
    rates = [g["lr"] for g in ICOTraining(tiny, options, 2).configure_optimizers().param_groups]
    assert rates == [1e-5, 1e-5, 1e-4]
    training.scale_lr = True  # the paper's run: 6 reference images, 6e-5 and 6e-4 in effect
    rates = [g["lr"] for g in ICOTraining(tiny, options, 2).configure_optimizers().param_groups]
    assert rates == pytest.approx([6e-5, 6e-5, 6e-4])


def test_a_template_equals_the_same_prompt_written_as_text(tiny):
    options = config(context=ContextConfig(template="photo of a {} here"))
    module = ICOTraining(tiny, options, images=3)
    assert module.learned.context_parameters() == []
    learned = module.contexts(dataclasses.replace(batch([0, 2]), caption_prefix=["", "very small"]))
    text = tiny.text_encoder
    with torch.no_grad():
        for row, words in zip(learned, ("photo of a", "very small photo of a"), strict=True):
            ids = [*tokenizer.tokenize(words), 42170, 47629, *tokenizer.tokenize("dog here")]
            written = text.encode(text.embed(torch.tensor([tokenizer.frame(ids)])))[0]
            torch.testing.assert_close(row, written)


def test_one_context_can_be_shared_by_all_images(tiny):
    module = ICOTraining(tiny, config(context=ContextConfig(shared=True)), images=4)
    assert len(module.learned.context_parameters()) == 2
    module.learned.prefixes[0].data += torch.randn(3, 128)
    contexts = module.contexts(batch([0, 3]))
    assert torch.equal(contexts[0], contexts[1])
    module.loss(batch([2])).backward()
    assert module.learned.prefixes[0].grad.abs().max() > 0


def test_no_suffix_leaves_no_token_behind_the_noun(tiny):
    module = ICOTraining(tiny, config(context=ContextConfig(suffix="")), images=2)
    ids, extra = module.learned.training_prompts([1])
    noun = tokenizer.tokenize("dog")[0]
    assert ids[0, 5:8].tolist() == [tokenizer.VOCAB_SIZE + 1, noun, tokenizer.END]
    assert len(module.learned.context_parameters()) == 2
    assert len(extra) == 2 + 3


def test_several_concepts_have_tokens_and_nouns_of_their_own(tiny, tmp_path):
    concepts = [ConceptConfig("dog", ["ktn", "pll"], "a"), ConceptConfig("red car", images="b")]
    module = ICOTraining(tiny, FinetuneConfig(concepts=concepts), images=[2, 3])
    ids, _ = module.learned.training_prompts([1, 2])
    first = tokenizer.VOCAB_SIZE
    dog, red_car = tokenizer.tokenize("dog"), tokenizer.tokenize("red car")
    assert ids[0, 4 : 4 + 3].tolist() == [first, first + 1, *dog]
    assert ids[1, 4 : 4 + 3].tolist() == [first + 2, *red_car]
    module.loss(batch([0, 4])).backward()
    assert (module.learned.modifiers.grad.abs().amax(dim=1) > 0).all()
    module.learned.modifiers.grad = None
    module.loss(batch([1])).backward()
    assert (module.learned.modifiers.grad.abs().amax(dim=1) > 0).tolist() == [True, True, False]
    module.concept().save(tmp_path / "c.safetensors")
    assert Concept.load(tmp_path / "c.safetensors").names == (
        (("<new1>", "<new2>"), "dog"),
        (("<new3>",), "red car"),
    )


@pytest.mark.slow
def test_recomputed_blocks_and_channels_last_change_no_gradient(tiny):
    parts = batch([0, 1, REGULARIZATION])
    results = []
    for options in ({}, {"gradient_checkpointing": True}, {"channels_last": True}):
        module = ICOTraining(tiny, config(training=TrainingConfig(**options)), images=2)
        module.prepare()
        module.zero_grad(set_to_none=True)
        module.loss(parts).backward()
        results.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        tiny.unet.checkpointing = False
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max().item())


@pytest.mark.slow
def test_frozen_weights_are_kept_in_half_and_trained_ones_in_full(tiny):
    parts = batch([0])
    exact = ICOTraining(tiny, config(), images=1).loss(parts).item()
    module = ICOTraining(tiny, config(training=TrainingConfig(precision="bf16")), images=1)
    module.prepare()
    assert {p.dtype for p in module.trained().values()} == {torch.float32}
    frozen = [
        p
        for m in tiny.unet.modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        for p in m.parameters(recurse=False)
        if not p.requires_grad
    ]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.loss(parts)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.trained().values())
