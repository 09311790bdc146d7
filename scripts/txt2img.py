"""Draw pictures of a prompt with the base model alone.

python scripts/txt2img.py --prompt "a dog on the beach"
"""

import dataclasses

from common import (
    Parser,
    add_sampling_options,
    base_model,
    draw,
    open_outdir,
    pick_device,
    run,
    sampling_arguments,
    save_pictures,
)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", required=True, help="what to draw")
    add_sampling_options(parser)
    args = parser.parse_args()

    from dci.settings import sampling_options
    from ldm.checkpoint import load_model
    from ldm.sampling import text_to_image

    base, checkpoint = base_model(args)
    model = load_model(base, checkpoint).to(pick_device(args.device))
    options = sampling_options(model, **sampling_arguments(args))
    outdir = open_outdir(args)
    pictures = draw(args, options.steps, lambda batch, progress: text_to_image(model, args.prompt, batch, options, progress))
    facts = {"prompt": args.prompt, "model": base, "checkpoint": checkpoint, **dataclasses.asdict(options)}
    save_pictures(outdir, pictures, facts)


if __name__ == "__main__":
    run(main)
