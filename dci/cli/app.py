"""Show what DCI does on a page: draw, look inside, learn a concept, compare settings.

python scripts/app.py
"""

from pathlib import Path

from dci.cli.arguments import Parser, port
from dci.cli.loading import pick_device


def main() -> None:
    """Serve the page until it is stopped with Ctrl-C."""
    parser = Parser(description=__doc__.splitlines()[0])
    concept = "concept files to choose from, beside the demo concepts and finished runs"
    parser.add_argument("--concept", nargs="+", default=[], metavar="FILE", help=concept)
    parser.add_argument("--logdir", default="logs", help="where runs are found and made (default logs)")
    parser.add_argument("--port", type=port, default=7860, help="default 7860")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to (default 127.0.0.1: this machine alone)")
    model = "YAML, .ckpt or .safetensors file, diffusers folder, hub id (default: the concept's, or the embedded model)"
    parser.add_argument("--model", help=model)
    parser.add_argument("--checkpoint", "--ckpt", help="weights in place of the model's own")
    parser.add_argument("--vae", metavar="FILE", help="an autoencoder's file or folder, in place of the model's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    clip = "encoder of the plane's CLIP-T, such as open_clip:ViT-B-32/openai (default: the embedded one)"
    parser.add_argument("--clip", default="tiny", metavar="NAME", help=clip)
    instance = "encoder of its DINO-I, such as timm:vit_small_patch16_224.dino"
    parser.add_argument("--instance", default="tiny", metavar="NAME", help=instance)
    args = parser.parse_args()

    from dci.app.server import check_address, serve
    from dci.app.settings import Settings
    from dci.app.studio import Weights
    from dci.evaluation.evaluate import check_encoders
    from dci.files import check_folder
    from ldm.errors import UserError

    check_address(args.host, args.port)
    check_encoders(args.clip, args.instance)
    check_folder(args.logdir, "--logdir")
    for file in args.concept:
        if not Path(file).exists():
            raise UserError(f"--concept {file}: there is no such file")
    weights = Weights(args.model, args.checkpoint, args.vae, pick_device(args.device))
    concepts = tuple(Path(file) for file in args.concept)
    serve(Settings(weights, concepts, Path(args.logdir), args.host, args.port, args.clip, args.instance))
