"""Metadata in the header of a LoRA file: for other programs, and for our own import."""

from dci.concept.concept_file import Concept
from ldm.config import ModelConfig

_ARCHITECTURES = {
    "sd-v1": "stable-diffusion-v1",
    "sd-v2": "stable-diffusion-v2-512",
    "sd-v2-v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_OURS = "dci."


def family(config: ModelConfig) -> str:
    """Return which of Stable Diffusion's families a model belongs to; the embedded one counts as 1.x."""
    if config.name in _ARCHITECTURES:
        return config.name
    return "sd-v1" if config.text_encoder.kind == "clip" else "sd-v2"


def header(concept: Concept, config: ModelConfig, name: str, prompt: str, ranks: set[int]) -> dict[str, str]:
    """Return the metadata of an exported file: kohya's `ss_*`, the model specification's, and our own.

    Args:
        name: of the file, and of its alias in A1111.
        prompt: the words that stand for the concept there.
        ranks: of the layers, {} where they have none.
    """
    kind = family(config)
    base = {"sd-v1": "sd_v1", "sdxl": "sdxl_base_v1-0"}.get(kind, "sd_v2")
    found = {
        "format": "pt",
        "ss_base_model_version": base,
        "ss_v2": str(base == "sd_v2"),
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[kind]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.trigger_phrase": prompt,
        "modelspec.usage_hint": f"write '{prompt}' where the concept should be",
        "modelspec.resolution": f"{config.image_size}x{config.image_size}",
        "modelspec.prediction_type": "v" if config.schedule.parameterization == "v" else "epsilon",
    }
    if ranks:
        dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        found |= {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": "1.0"}
    return found | our_facts(concept)


def our_facts(concept: Concept) -> dict[str, str]:
    """Return the facts of a concept that a later import needs, as texts for a header."""
    nouns = ",".join(name.class_noun for name in concept.names)
    facts = {
        "class_noun": nouns,
        "base": concept.base,
        "base_name": concept.base_name,
        "tokens": str(len(concept.modifiers)),
    }
    return {_OURS + key: value for key, value in facts.items()}


def facts_of(metadata: dict[str, str]) -> dict[str, str]:
    """Return the facts that `our_facts` put into a header; {} for other programs' files."""
    return {key.removeprefix(_OURS): value for key, value in metadata.items() if key.startswith(_OURS)}
