"""Choosing the auxiliary noun: the one with which the base model obeys the prompts best, by CLIP-T."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dci.concept.concept_file import Concept
from dci.concept.prompts import parse_prompt
from dci.evaluation.encoders import TINY, Encoder, load_encoder
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.images import to_images
from ldm.text_to_image import SamplingOptions, text_to_image

AUTO = "auto"
"""In place of an auxiliary noun."""

MOST_PROMPTS = 8  # of a long list, evenly taken

_FAMILIES = {
    "animal": "alpaca bear bird cat cow dog duck elephant fish fox frog giraffe hamster hen horse kitten lion monkey mouse "
    "owl panda penguin pig puppy rabbit rooster sheep sloth snake squirrel tiger turtle wolf zebra",
    "vehicle": "ambulance bicycle bike boat bus car helicopter motorbike motorcycle plane rocket ship tractor train truck "
    "van",
    "toy": "doll figurine plushie plushy robot teddy teddybear",
    "container": "backpack bag basket bottle bowl can cup jar mug pot teapot vase",
    "person": "boy girl man woman",
    "piece of furniture": "bed bench chair lamp sofa table",
    "building": "barn castle church house lighthouse tower windmill",
}
"""More general nouns, and class nouns that they may stand for."""


@dataclass(frozen=True)
class NounScore:
    """How well the base model's images obeyed the prompts with a noun in the concept's place."""

    noun: str
    clip_t: float  # mean cosine of image and prompt


def default_candidates(class_noun: str) -> list[str]:
    """Return the class noun, its last word, and a more general noun: "tortoise plushy" -> also "plushy" and "toy"."""
    last = class_noun.split()[-1]
    family = next((family for family, members in _FAMILIES.items() if last.lower() in members.split()), "object")
    return list(dict.fromkeys([class_noun, last, family]))


def score_nouns(
    base: LatentDiffusion,
    concept: Concept,
    prompts: Sequence[str],
    candidates: Sequence[str],
    clip: Encoder,
    options: SamplingOptions,
    images: int = 4,
) -> list[NounScore]:
    """Score candidates for the auxiliary noun, the best one first; the earlier one wins a tie.

    With each candidate the base model generates images of the auxiliary prompts. All images are held against the
    same texts, the prompts with the class noun, so that the scores can be compared.

    Args:
        base: the model without the concept.
        prompts: that name the concept; at most 8 of them are used.
        clip: an encoder of images and texts.
        options: of the sampler; their seed makes the scores repeatable.
        images: of each prompt and candidate.

    Raises:
        UserError: no candidates, a prompt that does not name the concept, or several concepts in one file.
    """
    if not candidates:
        raise UserError("no candidates for the auxiliary noun: give some, such as dog,puppy,animal")
    prompts = prompts[:: -(-len(prompts) // MOST_PROMPTS)]

    def plain(prompt: str, noun: str) -> str:
        return parse_prompt(prompt, concept.names, noun).auxiliary

    texts = F.normalize(clip.text_features([plain(prompt, concept.class_noun) for prompt in prompts]), dim=-1)

    def score(noun: str) -> float:
        cosines = []
        for prompt, text in zip(prompts, texts, strict=True):
            generated = to_images(text_to_image(base, plain(prompt, noun), list(range(images)), options))
            cosines.append(F.normalize(clip.image_features(generated), dim=-1) @ text)
        return torch.cat(cosines).mean().item()

    scores = [NounScore(noun, score(noun)) for noun in candidates]
    return sorted(scores, key=lambda s: -s.clip_t)


def choose_noun(
    base: LatentDiffusion,
    concept: Concept,
    prompts: Sequence[str],
    options: SamplingOptions,
    clip: str | None = None,
    candidates: str | None = None,
) -> list[NounScore]:
    """Score candidates as `score_nouns` does, with an encoder that is loaded by its name.

    Args:
        clip: see `dci.evaluation.encoders`; None: the embedded one, for the embedded model.
        candidates: nouns with commas between them; None: `default_candidates`.

    Raises:
        UserError: as `score_nouns`; no encoder is named for a model that is not the embedded one, or there is none.
    """
    if not clip and base.config.name != "tiny":
        raise UserError(
            f"auxiliary_noun {AUTO}: a CLIP is needed that knows what '{base.config.name}' generates: name one as clip=, "
            "such as open_clip:ViT-B-32/openai"
        )
    given = [noun.strip() for noun in (candidates or "").split(",") if noun.strip()]
    encoder = load_encoder(clip or TINY, device=str(base.device))
    return score_nouns(base, concept, prompts, given or default_candidates(concept.class_noun), encoder, options)


def describe(scores: list[NounScore]) -> str:
    """Return in lines how the candidates did and which one is taken."""
    best = scores[0]
    lines = [f"  {s.clip_t:.4f}  {s.noun}" for s in scores]
    return "\n".join(["Auxiliary noun by CLIP-T of the base model's images:", *lines, f"Auxiliary noun: {best.noun}"])
