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
from output import check_sharing, draw, sampling_facts


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", required=True, help="the concept.safetensors that train_ico.py wrote")
    parser.add_argument("--verbose", action="store_true", help="show the branches' prompts and token positions")
    add_dci_options(parser)
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    check_sharing(args)
    texts = prompts_of(args)

    from dci import __version__
    from dci.concept import Concept
    from dci.files import file_hash
    from dci.layers import check_layers
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch
    from ldm.sampling import make_solver

    concept = Concept.load(args.concept)
    subjects = (concept.modifier_tokens, concept.class_noun)

    def parsed(noun: str | None) -> list:
        return [parse_prompt(text, *subjects, noun, concept.several) for text in texts]

    parsed(args.auxiliary_noun)  # what is wrong with them is said before the model is loaded
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
    prompts = parsed(choose_noun(args, model, concept, texts))
    if args.verbose:
        print("\n".join(prompt.describe() for prompt in prompts))
    concept.apply(model)
    facts = {
        "concept": args.concept,
        "concept_hash": file_hash(args.concept),
        "version": __version__,
        **sampling_facts(args, base, checkpoint, canvas, options, concept.base),
        "dci": dual and dataclasses.asdict(dual),
    }
    seeing = Seeing(args, model) if args.save_maps or args.save_steps else None

    def sample_batch(pictures: list, progress):
        rows, indices, seeds = zip(*((prompts[p.prompt], p.index, p.seed) for p in pictures), strict=True)

        def call(callback, maps=None):
            return sample(model, concept, list(rows), list(indices), options, dual, callback,
                          args.negative_prompt, canvas, replaced, maps, list(seeds))  # fmt: skip

        return seeing.sample(call, rows, progress) if seeing else call(progress)

    written = zip(texts, prompts, strict=True)
    named = [{"prompt": text, "concept_prompt": p.concept, "auxiliary_prompt": p.auxiliary} for text, p in written]
    draw(args, named, facts, len(timesteps), sample_batch, seeing)


if __name__ == "__main__":
    run(main)
