"""prompts.json as version 0.2 wrote it: its images are known again, and the same plan writes the same bytes."""

import json

from helpers import STORED
from PIL import Image

from dci.dual_branch.integration import DualBranch
from dci.samples.image_metadata import LEFT_OUT, PromptMetadata, SamplingMetadata
from dci.samples.plan import Plan
from dci.samples.reader import concept_files, read_samples
from dci.samples.writer import SampleFolder
from ldm.text_to_image import SamplingOptions

PLAN = Plan(
    [
        PromptMetadata("a V* cat on the beach", "a <new1> <new2> cat on the beach", "a cat on the beach"),
        PromptMetadata("V* in the snow", "<new1> <new2> cat in the snow", "cat in the snow"),
    ],
    SamplingMetadata(
        concept="c.safetensors",
        concept_hash="86a0addad559c014",
        strength_concept=0.5,
        loras={"style.safetensors:0.5": "5b1f501f9a3f0f14"},
        version="0.2.0",
        negative_prompt="a car",
        model="configs/model/tiny.yaml",
        checkpoint=None,
        model_hash="92b8794a0ad4040a",
        model_config_hash="a15fce77c5763965",
        ema=False,
        vae="vae.safetensors",
        vae_hash="94d43e127a1203b0",
        clip_skip=1,
        precision="fp32",
        init_image="init.png",
        init_image_hash="b8362f8987e19294",
        mask="mask.png",
        mask_hash="558cfbad57f2ea35",
        strength=0.8,
        options=SamplingOptions(steps=2, height=64, width=64, spacing="leading"),
        dci=DualBranch(gain=31.0, layers=("input", "output")),
    ),
    seeds=[0],
    n_samples=1,
    batch_size=8,
)


def test_a_plan_writes_what_is_stored(tmp_path):
    with SampleFolder(tmp_path, PLAN):
        pass
    assert (tmp_path / "prompts.json").read_bytes() == (STORED / "prompts.json").read_bytes()


def test_a_stored_folder_is_gone_on_with_and_read(tmp_path):
    (tmp_path / "prompts.json").write_bytes((STORED / "prompts.json").read_bytes())
    with SampleFolder(tmp_path, PLAN) as folder:
        for number in folder.missing(range(len(PLAN))):
            folder.save(number, Image.new("RGB", (64, 64)))
    assert (tmp_path / "prompts.json").read_bytes() == (STORED / "prompts.json").read_bytes()
    samples = read_samples(tmp_path)
    assert [(sample.text, sample.noise) for sample in samples] == [("a cat on the beach", "0:0"), ("cat in the snow", "0:0")]
    assert concept_files(tmp_path) == ["c.safetensors"]


def test_what_is_left_out_is_no_null():
    told = SamplingMetadata(options=PLAN.settings.options, checkpoint=None, dci=None).to_json()
    assert told == {"checkpoint": None, "dci": None} | PLAN.settings.options.metadata()
    assert json.loads(json.dumps(PromptMetadata("a dog", LEFT_OUT).to_json())) == {"prompt": "a dog"}
