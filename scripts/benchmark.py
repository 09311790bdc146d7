"""Time sampling with DCI against plain sampling, in alternation in one process.

python scripts/benchmark.py --rounds 5
"""

import json
import statistics
import time

from common import TINY, Parser, pick_device, positive, run


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds, after one to warm up (default 5)")
    parser.add_argument("--batch", type=positive, default=4, help="pictures at a time (default 4)")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--agg-time", type=float, default=0.3)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--checkpoint", "--ckpt")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    import torch

    from dci.config import ConceptConfig, FinetuneConfig
    from dci.prompts import parse_prompt
    from dci.sampling import sample
    from dci.settings import dual_branch, sampling_options
    from dci.training import ICOTraining
    from ldm.checkpoint import load_model

    device = pick_device(args.device)
    model = load_model(args.model, args.checkpoint).to(device)
    # An untrained concept costs what a trained one does.
    concept = ICOTraining(model, FinetuneConfig(concept=ConceptConfig(class_noun="dog")), pictures=1).concept()
    model.requires_grad_(False)
    prompt = parse_prompt("a V* dog on the beach", concept.modifier_tokens, "dog")
    options = sampling_options(model, steps=args.steps)
    ways = {"plain": None, "dci": dual_branch(model, agg_time=args.agg_time)}

    seconds = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        for name, dual in ways.items():
            start = time.perf_counter()
            sample(model, concept, prompt, list(range(args.batch)), options, dual)
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)

    ratios = [dci / plain for dci, plain in zip(seconds["dci"], seconds["plain"], strict=True)]
    result = {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "model": model.config.name,
        "batch": args.batch,
        "steps": args.steps,
        "agg_time": args.agg_time,
        **{f"{name}_seconds_median": round(statistics.median(times), 3) for name, times in seconds.items()},
        "dci_over_plain_median": round(statistics.median(ratios), 3),
        "dci_over_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run(main)
