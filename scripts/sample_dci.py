"""Draw a learned concept in new places with DCI: divide, conquer, then integrate.

python scripts/sample_dci.py --concept logs/RUN/concept.safetensors --prompt "a V* dog on the beach"
"""

import dataclasses

from branches import Seeing, add_dci_options, check_steps, choose_noun, settings_of
from common import (
    Parser,
    add_sampling_options,
    base_model,
    canvas_and_options,
    load_base,
    pick_device,
    prompts_of,
    run,
)
from output import draw, sampling_facts


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", required=True, help="the concept.safetensors that train_ico.py wrote")
    parser.add_argument("--verbose", action="store_true", help="show the branches' prompts and token positions")
    add_dci_options(parser)
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    texts = prompts_of(args)

    from dci import __version__
    from dci.concept import Concept
    from dci.layers import check_layers
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch
    from ldm.sampling import make_solver

    concept = Concept.load(args.concept)

    def parsed(noun: str | None):
        tokens = concept.modifier_tokens
        return [(text, parse_prompt(text, tokens, concept.class_noun, noun, concept.several)) for text in texts]

    prompts = parsed(args.auxiliary_noun)
    base, checkpoint = base_model(args, concept.config)
    model = load_base(args, base, checkpoint)
    replaced = concept.replaced(model)
    model.to(pick_device(args.device))
    canvas, options = canvas_and_options(args, model)
    dual = None if args.no_dci else dual_branch(model, **settings_of(args))
    timesteps = make_solver(model, options, canvas).timesteps
    check_steps(args, dual, timesteps)
    if dual:
        check_layers(model, options, dual.layers)
    noun = choose_noun(args, model, concept, texts)
    prompts = parsed(noun)
    if args.verbose:
        print("\n".join(prompt.describe() for _, prompt in prompts))
    concept.apply(model)
    seeing = Seeing(args, model)
    facts = {
        "concept": args.concept,
        "version": __version__,
        **sampling_facts(args, base, checkpoint, canvas, options),
        "dci": dual and dataclasses.asdict(dual),
    }
    draw(
        args,
        prompts,
        len(timesteps),
        lambda prompt, indices, progress: seeing.sample(
            lambda callback, maps: sample(
                model, concept, prompt[1], indices, options, dual, callback, args.negative_prompt, canvas, replaced, maps
            ),
            prompt[1],
            progress,
        ),
        lambda prompt: {
            "prompt": prompt[0],
            "concept_prompt": prompt[1].concept,
            "auxiliary_prompt": prompt[1].auxiliary,
            **facts,
        },
        seeing.save if args.save_maps or args.save_steps else None,
    )


if __name__ == "__main__":
    run(main)
