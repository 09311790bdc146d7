"""Generate a learned concept in new places with DCI: divide, conquer, then integrate.

python scripts/sample_dci.py --concept logs/RUN/concept.safetensors --prompt "a V* dog on the beach"
"""

from dci.cli.arguments import Parser, add_sampling_options, prompts_of
from dci.cli.branches import add_dci_options, check_maps, choose_noun, describe_gain, settings_of, warn_of_no_effect
from dci.cli.loading import (
    add_concept_options,
    base_model,
    base_vae,
    load_base,
    pick_device,
    read_concept,
    request_of,
)
from dci.cli.output import check_sharing, generate, sampling_metadata


def arguments():
    """Parse the concept, the prompts and the options of sampling and of DCI."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_concept_options(parser)
    parser.add_argument("--verbose", action="store_true", help="show the branches' prompts and token positions")
    add_dci_options(parser)
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    """Load the concept with its base model, sample every prompt, and save the images with their metadata."""
    args = arguments()
    check_sharing(args)
    texts = prompts_of(args)
    warn_of_no_effect(args)

    from dci.concept.loras import add_trained_loras, on_loras
    from dci.concept.prompts import parse_prompt
    from dci.dual_branch.recorder import BranchRecorder
    from dci.dual_branch.sampling import Observers
    from dci.pipeline import Pipeline
    from dci.samples.image_metadata import prompt_metadata, with_concept
    from ldm.checkpoint import fingerprint

    concept = read_concept(args)
    for text in texts:  # refuse them before the model is loaded
        parse_prompt(text, concept.names, args.auxiliary_noun)
    base, checkpoint = base_model(args, concept.trained_on)
    args.vae = base_vae(args, concept.trained_on)
    model = load_base(args, base, checkpoint)
    add_trained_loras(model, concept, args.lora)
    model_hash = fingerprint(model)
    concept = on_loras(concept, model, args.lora, args.strength_concept)
    model.to(pick_device(args.device))
    noun = choose_noun(args, model, concept, texts)
    pipeline = Pipeline.of(model, concept)
    request = request_of(args, texts, dci=not args.no_dci, auxiliary_noun=noun, settings=settings_of(args))
    prepared = pipeline.prepare(request)
    prepared.warn()
    check_maps(args, prepared)
    if args.verbose:
        print("\n".join(prompt.describe() for prompt in prepared.prompts))
    if prepared.dual:
        print(describe_gain(prepared))
    metadata = sampling_metadata(args, base, checkpoint, prepared, model_hash)
    metadata = with_concept(metadata, prepared, args.concept, args.strength_concept, args.class_noun, args.trigger)
    recorder = BranchRecorder(model, args.save_maps, args.save_steps) if args.save_maps or args.save_steps else None

    def sample_batch(planned: list, progress):
        prompts, indices, seeds = zip(*((image.prompt, image.number, image.seed) for image in planned), strict=True)

        def call(callback, maps=None):
            return prepared.sample(prompts, indices, seeds, Observers(callback, maps))

        rows = [prepared.prompts[number] for number in prompts]
        return recorder.sample(call, rows, progress) if recorder else call(progress)

    generate(args, prompt_metadata(prepared), metadata, len(prepared.timesteps), sample_batch, recorder)
