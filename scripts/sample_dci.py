"""Draw a learned concept in new places with DCI: divide, conquer, then integrate.

python scripts/sample_dci.py --concept logs/RUN/concept.safetensors --prompt "a V* dog on the beach"
"""

import dataclasses

from common import (
    Parser,
    add_sampling_options,
    base_model,
    canvas_and_options,
    load_base,
    number,
    pick_device,
    prompts_of,
    run,
)
from output import check_sharing, draw, sampling_facts


def arguments():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", required=True, help="the concept.safetensors that train_ico.py wrote")
    parser.add_argument("--auxiliary-noun", help="a noun that the base model knows well (default: the class noun)")
    parser.add_argument("--agg-time", type=number, help="T_a: share of the timesteps with both branches, 0 to 1")
    parser.add_argument("--agg-lambda", type=number, help="weight of the auxiliary branch, typically -2 to 2")
    parser.add_argument("--gain", type=number, help="gain of the integration (default: the model's)")
    parser.add_argument("--separate-guidance", action="store_true", help="guide the auxiliary branch by itself")
    parser.add_argument("--no-dci", action="store_true", help="plain sampling of the fine-tuned model")
    parser.add_argument("--verbose", action="store_true", help="show the branches' prompts and token positions")
    add_sampling_options(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    check_sharing(args)
    texts = prompts_of(args)

    from dci import __version__
    from dci.concept import Concept
    from dci.files import file_hash
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch
    from ldm.sampling import make_solver

    concept = Concept.load(args.concept)
    noun, tokens = concept.class_noun, concept.modifier_tokens
    prompts = [parse_prompt(text, tokens, noun, args.auxiliary_noun, concept.several) for text in texts]
    if args.verbose:
        print("\n".join(prompt.describe() for prompt in prompts))
    base, checkpoint = base_model(args, concept.config)
    model = load_base(args, base, checkpoint)
    concept.apply(model)
    model.to(pick_device(args.device))

    canvas, options = canvas_and_options(args, model)
    calls = len(make_solver(model, options, canvas).timesteps)
    shared = False if args.separate_guidance else None
    dual = dual_branch(model, agg_time=args.agg_time, agg_lambda=args.agg_lambda, gain=args.gain, shared_guidance=shared)
    dual = None if args.no_dci else dual
    facts = {
        "concept": args.concept,
        "concept_hash": file_hash(args.concept),
        "version": __version__,
        **sampling_facts(args, base, checkpoint, canvas, options, concept.base),
        "dci": dual and dataclasses.asdict(dual),
    }

    def sample_batch(pictures, progress):
        rows, indices = [prompts[p.prompt] for p in pictures], [p.index for p in pictures]
        seeds = [p.seed for p in pictures]
        return sample(model, concept, rows, indices, options, dual, progress, args.negative_prompt, canvas, seeds)

    written = zip(texts, prompts, strict=True)
    named = [{"prompt": text, "concept_prompt": p.concept, "auxiliary_prompt": p.auxiliary} for text, p in written]
    draw(args, named, facts, calls, sample_batch)


if __name__ == "__main__":
    run(main)
