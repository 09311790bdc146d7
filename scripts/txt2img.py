"""Draw pictures with the base model alone: of a prompt, from a picture, or into a picture.

python scripts/txt2img.py --prompt "a dog on the beach"
"""

from common import Parser, add_sampling_options, base_model, canvas_and_options, load_base, pick_device, prompts_of, run
from output import draw, sampling_facts


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add_sampling_options(parser)
    args = parser.parse_args()
    prompts = prompts_of(args)

    from ldm.sampling import make_solver, text_to_image

    base, checkpoint = base_model(args)
    model = load_base(args, base, checkpoint).to(pick_device(args.device))
    canvas, options = canvas_and_options(args, model)
    calls = len(make_solver(model, options, canvas).timesteps)
    facts = sampling_facts(args, base, checkpoint, canvas, options)
    draw(
        args,
        prompts,
        calls,
        lambda prompt, indices, progress: text_to_image(
            model, prompt, indices, options, progress, args.negative_prompt, canvas
        ),
        lambda prompt: {"prompt": prompt, **facts},
    )


if __name__ == "__main__":
    run(main)
