"""Show what a concept has learned: its tokens, their nearest words, and how far each layer has moved.

python scripts/inspect_concept.py logs/RUN/concept.safetensors --plot changes.png
"""

from pathlib import Path

from dci.cli.arguments import Parser, positive
from dci.cli.loading import load_concept_base
from ldm.errors import UserError


def main() -> None:
    """Print the tokens' neighbours and the layers' changes, and plot the changes if asked to."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("concept", metavar="CONCEPT", help="a concept file")
    parser.add_argument("--nearest", type=positive, default=5, help="words to show for each token (default 5)")
    parser.add_argument("--no-contexts", action="store_true", help="the modifier tokens alone")
    parser.add_argument("--plot", help="plot the change of keys and values, layer by layer, into this file")
    parser.add_argument("--model", help="model configuration (default: the concept's own)")
    parser.add_argument("--checkpoint", "--ckpt", help="weights, in place of the configuration's own")
    args = parser.parse_args()

    if args.plot:
        check_plot(args.plot)

    from dci.concept.concept_file import Concept
    from dci.concept.inspection import inspect_tokens, kind_of, short_name, weight_changes

    concept = Concept.load(args.concept)
    model = load_concept_base(args, concept)
    for named in concept.names:
        print(f"{' '.join(named.modifier_tokens)} {named.class_noun}, on the base model '{concept.base_name}'")
    for token in inspect_tokens(concept, model, args.nearest, not args.no_contexts):
        words = ", ".join(f"{near.word} {near.cosine:.2f}" for near in token.nearest)
        print(f"{token.name:24} length {token.norm:.3f}   near: {words}")
    changes = weight_changes(concept, model)
    for name, change in changes.items():
        print(f"{short_name(name):12} {kind_of(name):9} changed by {change:.4f}")
    if args.plot and changes:
        plot_changes(changes, args.plot)
        print(f"Plot: {args.plot}")
    elif args.plot:
        print("No plot: only tokens were trained, no layer has changed")


def check_plot(file: str) -> None:
    """Raise UserError for a file that no plot can be written into, by its name."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if Path(file).is_dir() or Path(file).suffix.lower().lstrip(".") not in known:
        raise UserError(f"--plot {file}: expected a file's name that ends in .png, .svg or .pdf")


def plot_changes(changes: dict[str, float], file: str) -> None:
    """Plot a bar for each weight, keys and values beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from dci.concept.inspection import kind_of, short_name

    layers = list(dict.fromkeys(short_name(name) for name in changes))
    kinds = list(dict.fromkeys(kind_of(name) for name in changes))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.6 * len(layers)), 4), layout="constrained")
    for k, kind in enumerate(kinds):
        values = {short_name(n): change for n, change in changes.items() if kind_of(n) == kind}
        places = [i + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for i in range(len(layers))]
        axes.bar(places, [values.get(layer, 0) for layer in layers], 0.8 / len(kinds), label=kind)
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    axes.set_ylabel("change, relative to the base's weight")
    axes.legend()
    figure.savefig(file, dpi=120)
