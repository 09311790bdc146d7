"""Draw a learned concept in new places with DCI: divide, conquer, then integrate.

python scripts/sample_dci.py --concept logs/RUN/concept.safetensors --prompt "a V* dog on the beach"
"""

import dataclasses

from common import (
    Parser,
    add_sampling_options,
    base_model,
    draw,
    number,
    open_outdir,
    pick_device,
    run,
    sampling_arguments,
    save_pictures,
)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", required=True, help="the concept.safetensors that train_ico.py wrote")
    parser.add_argument("--prompt", required=True, help="with V* (or {}) where the concept should be")
    parser.add_argument("--auxiliary-noun", help="a noun that the base model knows well (default: the class noun)")
    parser.add_argument("--agg-time", type=number, help="T_a: share of the timesteps with both branches, 0 to 1")
    parser.add_argument("--agg-lambda", type=number, help="weight of the auxiliary branch, typically -2 to 2")
    parser.add_argument("--gain", type=number, help="gain of the integration (default: the model's)")
    parser.add_argument("--separate-guidance", action="store_true", help="guide the auxiliary branch by itself")
    parser.add_argument("--no-dci", action="store_true", help="plain sampling of the fine-tuned model")
    parser.add_argument("--verbose", action="store_true", help="show the branches' prompts and token positions")
    add_sampling_options(parser)
    args = parser.parse_args()

    from dci import __version__
    from dci.concept import Concept
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch, sampling_options
    from ldm.checkpoint import load_model

    concept = Concept.load(args.concept)
    prompt = parse_prompt(args.prompt, concept.modifier_tokens, concept.class_noun, args.auxiliary_noun)
    if args.verbose:
        print(prompt.describe())
    base, checkpoint = base_model(args, concept.config)
    model = load_model(base, checkpoint)
    concept.apply(model)
    model.to(pick_device(args.device))

    options = sampling_options(model, **sampling_arguments(args))
    shared = False if args.separate_guidance else None
    dual = dual_branch(model, agg_time=args.agg_time, agg_lambda=args.agg_lambda, gain=args.gain, shared_guidance=shared)
    dual = None if args.no_dci else dual

    outdir = open_outdir(args)
    pictures = draw(
        args, options.steps, lambda batch, progress: sample(model, concept, prompt, batch, options, dual, progress)
    )
    facts = {
        "prompt": args.prompt,
        "concept_prompt": prompt.concept,
        "auxiliary_prompt": prompt.auxiliary,
        "concept": args.concept,
        "version": __version__,
        "model": base,
        "checkpoint": checkpoint,
        "dci": dual and dataclasses.asdict(dual),
        **dataclasses.asdict(options),
    }
    save_pictures(outdir, pictures, facts)


if __name__ == "__main__":
    run(main)
