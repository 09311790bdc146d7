"""Generate images with the base model alone: of a prompt, from an image, or into an image.

python scripts/txt2img.py --prompt "a dog on the beach"
"""

from dci.cli.arguments import Parser, add_sampling_options, prompts_of
from dci.cli.loading import base_model, load_base, pick_device, request_of
from dci.cli.output import check_sharing, generate, sampling_metadata
from dci.samples.image_metadata import PromptMetadata


def main() -> None:
    """Load the model and its LoRAs, sample every prompt, and save the images with their metadata."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_sampling_options(parser)
    args = parser.parse_args()
    check_sharing(args)
    texts = prompts_of(args)

    from dci.concept.loras import add_loras
    from dci.dual_branch.sampling import Observers
    from dci.pipeline import Pipeline
    from ldm.checkpoint import fingerprint

    base, checkpoint = base_model(args)
    model = load_base(args, base, checkpoint)
    known = fingerprint(model)
    add_loras(model, args.lora)
    model.to(pick_device(args.device))
    prepared = Pipeline.of(model).prepare(request_of(args, texts))
    prepared.warn()
    metadata = sampling_metadata(args, base, checkpoint, prepared, known)

    def sample_batch(planned, progress):
        prompts, indices, seeds = zip(*((image.prompt, image.number, image.seed) for image in planned), strict=True)
        return prepared.sample(prompts, indices, seeds, Observers(progress))

    generate(args, [PromptMetadata(text) for text in texts], metadata, len(prepared.timesteps), sample_batch)
