"""The programs for other programs' files: exit code 2 and one line for what cannot be used."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import pixels, refused, run_here, run_main
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from dci.concept.concept_file import Concept
from ldm.formats.diffusers_export import write_folder

TINY = ("--model", "configs/model/tiny.yaml")
DRAWN = ("--prompt", "a V* cat", "--steps", 2, "--n-samples", 1, "--device", "cpu")
ATTENTION = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": torch.ones(2, 2), "y": torch.ones(2, 2)}, "nor of another kind that is known here"),
        ({"<new1>": torch.ones(7)}, "its tokens are 7 wide, those of the model 'tiny' 128"),
    ],
)
@pytest.mark.parametrize("program", ["import_concept.py", "sample_dci.py"])
def test_files_that_cannot_be_used(capfd, tmp_path, program, content, words, monkeypatch):
    torch.save(content, tmp_path / "x.pt")
    files = (
        [tmp_path / "x.pt", "--out", tmp_path / "c.safetensors"]
        if program.startswith("import")
        else ["--concept", tmp_path / "x.pt", "--prompt", "a V* cat"]
    )
    refused(run_here(capfd, program, *files, "--class-noun", "cat", *TINY), words)


@pytest.mark.parametrize(
    ("program", "args", "words"),
    [
        ("sample_dci.py", ("--concept", "{}/none.safetensors", "--prompt", "a V* cat", *TINY), "none.safetensors"),
        ("export_concept.py", ("{}/none.safetensors", "--to", "lora"), "none.safetensors"),
        ("export_concept.py", ("{}/c.safetensors", "--to", "png"), "png"),
    ],
)
def test_options_that_cannot_be_used(capfd, tmp_path, program, args, words):
    refused(run_here(capfd, program, *[arg.replace("{}", str(tmp_path)) for arg in args]), words)


@pytest.mark.slow
def test_the_error_of_a_rank_is_printed_as_compress_concept_does(finetuned, tmp_path, capfd):
    finetuned[1].save(tmp_path / "c.safetensors")
    run_main("export_concept.py", tmp_path / "c.safetensors", "--to", "lora", "--rank", 2, "--out", tmp_path / "out", *TINY)
    exported = capfd.readouterr().out
    run_main("compress_concept.py", tmp_path / "c.safetensors", "--rank", 2, "--out", tmp_path / "small.safetensors", *TINY)
    compressed = capfd.readouterr().out
    (line,) = [line for line in exported.splitlines() if "reconstruction error" in line]
    assert line.lower() in compressed.lower()
    (file,) = [line for line in compressed.splitlines() if "reconstruction error" in line]
    assert float(file.split("reconstruction error ")[1].split()[0]) > 0


@pytest.mark.slow
def test_dora_is_refused_by_name(tiny_base, tmp_path, capfd):
    """As PEFT makes it of diffusers' UNet, and as kohya's scripts name its scale."""
    write_folder(tiny_base.state_dict(), tiny_base.config, tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "base/unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], use_dora=True))
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(unet))
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{place}.dora_scale": torch.ones(64, 1),
            f"{place}.lora_down.weight": torch.ones(2, 64),
            f"{place}.lora_up.weight": torch.ones(64, 2),
        },
        tmp_path / "kohya.safetensors",
    )
    for file in (tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "kohya.safetensors"):
        result = run_here(
            capfd, "import_concept.py", file, "--class-noun", "cat", "--out", tmp_path / "c.safetensors", *TINY
        )
        refused(result, "is a DoRA", "give a plain LoRA")


@pytest.fixture
def icos_file(tiny_base, tmp_path):
    """What DCI_ICO writes beside a checkpoint: keys and values without a prefix, and the whole token table."""
    table = torch.cat([tiny_base.text_encoder.token_table, 0.1 * torch.randn(2, 128)])
    prefix, ending = "model.diffusion_model.", (".attn2.to_k.weight", ".attn2.to_v.weight")
    state = {
        name.removeprefix(prefix): torch.nn.Parameter(1.5 * weight)
        for name, weight in tiny_base.state_dict().items()
        if name.endswith(ending)
    }
    state["transformer.text_model.embeddings.token_embedding.weight"] = table
    torch.save({"state_dict": state}, tmp_path / "embeddings_gs-899.ckpt")
    return tmp_path / "embeddings_gs-899.ckpt"


@pytest.mark.slow
def test_dci_icos_file_is_imported_or_sampled_directly(icos_file, tmp_path, capfd):
    noun = ("--class-noun", "cat", *TINY)
    run_main("import_concept.py", icos_file, *noun, "--out", tmp_path / "c.safetensors")
    out = capfd.readouterr().out
    assert "DCI_ICO's embeddings" in out and "2 learned tokens" in out and "the last 2 rows are taken" in out
    images = []
    for name, concept in (("a", [icos_file, *noun]), ("b", [tmp_path / "c.safetensors"])):
        run_main("sample_dci.py", "--concept", *concept, *DRAWN, "--outdir", tmp_path / name)
        images.append(pixels(tmp_path / name / "samples/00000.png"))
    assert np.array_equal(*images)


@pytest.mark.slow
def test_a_tuned_model_is_imported_as_a_whole_or_by_its_cross_attention(tiny_base, tmp_path, capfd):
    state = {name: weight.clone() for name, weight in tiny_base.state_dict().items()}
    conv, query = ("middle_block.0.in_layers.2.weight", "middle_block.1.transformer_blocks.0.attn2.to_q.weight")
    for name in (conv, query):
        state["model.diffusion_model." + name] += 0.01
    save_file({name: weight.contiguous() for name, weight in state.items()}, tmp_path / "dreambooth.safetensors")
    files = (tmp_path / "dreambooth.safetensors", "--class-noun", "cat", "--trigger", "sks")
    for which, expected in (("all", {conv, query}), ("cross-attention", {query})):
        run_main("import_concept.py", *files, "--weights", which, *TINY, "--out", tmp_path / "c.safetensors")
        concept = Concept.load(tmp_path / "c.safetensors")
        assert {name.removeprefix("model.diffusion_model.") for name in concept.changed} == expected
        assert f"{len(expected)} of {len(state)} weights differ" in capfd.readouterr().out
    refused(run_here(capfd, "import_concept.py", *files, "--out", tmp_path / "d.safetensors"), "--model")


@pytest.fixture
def lora_and_tokens(tiny_base, tmp_path):
    """A folder with a LoRA of one layer and the tokens of a concept, both for the embedded model."""
    place = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    rows, columns = tiny_base.state_dict()[ATTENTION].shape
    save_file(
        {f"{place}.lora_down.weight": torch.ones(2, columns), f"{place}.lora_up.weight": torch.ones(rows, 2)},
        tmp_path / "lora.safetensors",
    )
    save_file({"mycat": torch.ones(1, 128)}, tmp_path / "mycat.safetensors")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (["lora"], TINY, "for it as --class-noun, such as dog"),
        (["lora"], ("--class-noun", "cat", *TINY), "in prompts as --trigger, such as sks"),
        (["lora"], ("--class-noun", "cat", "--trigger", "sks"), "made for as --model"),
        (["lora"], ("--class-noun", "cat,", *TINY), "--class-noun 'cat,': expected an ordinary word"),
        (
            ["lora", "mycat"],
            ("--class-noun", "cat", "--trigger", "my cat", *TINY),
            "--trigger 'my cat': the files bring 1 learned tokens",
        ),
    ],
)
def test_what_is_missing_is_asked_for_by_the_programs_options(lora_and_tokens, capfd, files, options, words):
    """The library names options as Python knows them."""
    files = [lora_and_tokens / f"{name}.safetensors" for name in files]
    refused(run_here(capfd, "import_concept.py", *files, "--out", lora_and_tokens / "c.safetensors", *options), words)


@pytest.mark.slow
def test_an_import_without_its_model_is_noted_by_the_programs_option(tmp_path, capfd):
    save_file({"mydog": torch.randn(1, 768)}, tmp_path / "mydog.safetensors")
    run_main("import_concept.py", tmp_path / "mydog.safetensors", "--class-noun", "dog", "--out", tmp_path / "d.safetensors")
    assert "cannot be checked later: give it as --model to have that done" in capfd.readouterr().out


@pytest.mark.slow
def test_what_two_files_bring_alike_counts_once(finetuned, tmp_path, capfd):
    """A LoRA with the tokens inside beside the tokens' own file; the same weights twice; two concepts at once."""
    finetuned[1].save(tmp_path / "c.safetensors")
    bundle = ("--to", "lora", "--bundle", "--name", "mymy", "--out", tmp_path)
    run_main("export_concept.py", tmp_path / "c.safetensors", *bundle, *TINY)
    lora, tokens = (next(tmp_path.rglob(name)) for name in ("mymy-lora.safetensors", "mymy.safetensors"))
    out = ("--class-noun", "cat", *TINY, "--out", tmp_path / "back.safetensors")
    run_main("import_concept.py", tokens, lora, *out)
    assert "they are taken once" in capfd.readouterr().out
    back = Concept.load(tmp_path / "back.safetensors")
    torch.testing.assert_close(back.modifiers, finetuned[1].modifiers.float(), atol=1e-3, rtol=1e-3)
    (tmp_path / "again.safetensors").write_bytes(lora.read_bytes())
    refused(run_here(capfd, "import_concept.py", lora, tmp_path / "again.safetensors", *out), "would count twice")
    weight = finetuned[1].keys_values[ATTENTION].float()
    for name, factor in (("one", 1), ("two", 2)):
        tokens = {"<new1>": torch.full((128,), float(factor))}
        torch.save({"state_dict": {ATTENTION: factor * weight}, "modifier_token": tokens}, tmp_path / f"{name}.ckpt")
    refused(run_here(capfd, "import_concept.py", tmp_path / "one.ckpt", tmp_path / "two.ckpt", *out), "both replace")
