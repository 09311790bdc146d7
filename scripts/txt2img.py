"""Draw pictures with the base model alone: of a prompt, from a picture, or into a picture.

python scripts/txt2img.py --prompt "a dog on the beach"
"""

from common import Parser, add_sampling_options, base_model, canvas_and_options, load_base, pick_device, prompts_of, run
from output import check_sharing, draw, sampling_facts


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add_sampling_options(parser)
    args = parser.parse_args()
    check_sharing(args)
    texts = prompts_of(args)

    from ldm.checkpoint import fingerprint
    from ldm.sampling import make_solver, text_to_image

    base, checkpoint = base_model(args)
    model = load_base(args, base, checkpoint).to(pick_device(args.device))
    canvas, options = canvas_and_options(args, model)
    calls = len(make_solver(model, options, canvas).timesteps)
    facts = sampling_facts(args, base, checkpoint, canvas, options, fingerprint(model))

    def sample_batch(pictures, progress):
        prompts, indices = [texts[p.prompt] for p in pictures], [p.index for p in pictures]
        seeds = [p.seed for p in pictures]
        return text_to_image(model, prompts, indices, options, progress, args.negative_prompt, canvas, seeds)

    draw(args, [{"prompt": text} for text in texts], facts, calls, sample_batch)


if __name__ == "__main__":
    run(main)
