"""Data sets of the published size, with stand-ins for their images and prompts."""

import json
from pathlib import Path

DREAMBENCH_SUBJECTS, DREAMBENCH_CLASSES, DREAMBENCH_PROMPTS = 30, 15, 25
"""Of google/dreambooth's prompts_and_classes.txt."""
CUSTOMCONCEPT_SUBJECTS, CUSTOMCONCEPT_PROMPTS = 101, 20
"""Of CustomConcept101's dataset.json and prompts/; here every concept has a noun of its own."""


def dreambench(folder: Path) -> Path:
    """Make a folder of DreamBench's layout and size; return it."""
    nouns = ["dog", "cat", *(f"thing{i}" for i in range(DREAMBENCH_CLASSES - 2))]
    lines = ["Classes", "", "subject_name,class"]
    for i in range(DREAMBENCH_SUBJECTS):
        (folder / f"subject{i}").mkdir(parents=True)
        lines.append(f"subject{i},{nouns[i % len(nouns)]}")
    prompts = [f"'a {{0}} {{1}} in place {i}'.format(unique_token, class_token)," for i in range(DREAMBENCH_PROMPTS)]
    for kind in ("Object Prompts", "Live Subject Prompts"):
        lines += ["", kind, "", "prompt_list = [", *prompts, "]"]
    (folder / "prompts_and_classes.txt").write_text("\n".join(lines))
    return folder


def customconcept101(folder: Path) -> Path:
    """Make a folder of CustomConcept101's layout and size; return it."""
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts/all.txt").write_text("\n".join(f"a {{}} in place {i}" for i in range(CUSTOMCONCEPT_PROMPTS)))
    entries = []
    for i in range(CUSTOMCONCEPT_SUBJECTS):
        (folder / f"benchmark_dataset/concept{i}").mkdir(parents=True)
        entry = {
            "instance_prompt": f"photo of a <new1> thing{i}",
            "class_prompt": f"thing{i}",
            "instance_data_dir": f"./benchmark_dataset/concept{i}",
            "class_data_dir": f"./regularization/concept{i}",
            "prompt_filename": "prompts/all.txt",
        }
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder
