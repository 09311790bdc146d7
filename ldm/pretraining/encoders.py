"""Training of the embedded encoders: contrastive for CLIP and the instance encoder, cross-entropy for the classifier."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import tokenizer
from ldm.embedded_encoders import Classifier, InstanceEncoder, WorldCLIP
from ldm.pretraining.artwork import NOUNS
from ldm.pretraining.config import PretrainConfig
from ldm.pretraining.loop import Network, PretrainingModule
from ldm.pretraining.scenes import PLACES

PROMPTS = 4  # of each class in a step; their mean is the class, as in zero-shot classification
IGNORED = -100  # label of an image that has none; cross_entropy leaves it out


def new_clip(captions: list[str]) -> WorldCLIP:
    """Return an untrained CLIP for the tokens of these captions."""
    tokens = {token for text in set(captions) for token in tokenizer.tokenize(text)}
    vocabulary = sorted(tokens | {tokenizer.START, tokenizer.END})
    config = {
        "embed_dim": 128,
        "vision_cfg": {"layers": [1, 2, 2, 1], "width": 24, "head_width": 64, "image_size": 64},
        "text_cfg": {"context_length": 32, "vocab_size": len(vocabulary) + 2, "width": 128, "heads": 4, "layers": 2},
    }
    encoder = WorldCLIP(copy.deepcopy(config), vocabulary)
    encoder.config = {"clip": config, "clip-vocabulary": vocabulary}
    return encoder


def new_instance_encoder() -> InstanceEncoder:
    """Return an untrained instance encoder."""
    config = {"layers": [1, 2, 2, 1], "width": 24, "heads": 12, "image_size": 64, "output_dim": 128}
    encoder = InstanceEncoder(config)
    encoder.config = {"instance": config}
    return encoder


def new_classifier() -> Classifier:
    """Return an untrained classifier of the world's nouns and places."""
    config = {"layers": [1, 1, 1, 1], "width": 16, "heads": 8, "image_size": 64}
    encoder = Classifier(config, list(NOUNS), [*PLACES, "plain"])
    encoder.config = {"classifier": {"config": config, "nouns": encoder.nouns, "places": encoder.places}}
    return encoder


def augmented(x: Tensor) -> Tensor:
    """Change images (b, 3, h, w) in [-1, 1] as a generator's faults may: shift, contrast, colour, blur, noise."""
    b = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape, device=x.device).uniform_(low, high)

    # One shift for the batch is enough: batches differ.
    dy, dx = torch.randint(0, 9, (2,)).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")[..., dy : dy + x.shape[2], dx : dx + x.shape[3]]
    x = torch.where(uniform(0, 1, b, 1, 1, 1) < 0.5, x, x.flip(-1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-0.6, 1.4, b, 1, 1, 1).clamp(0, 1))
    x = x * uniform(0.85, 1.15, b, 1, 1, 1) + uniform(-0.08, 0.08, b, 3, 1, 1)
    return x + uniform(-0.02, 0.08, b, 1, 1, 1).clamp(min=0) * torch.randn_like(x)


def contrastive_loss(a: Tensor, b: Tensor, scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021) of unit vectors a, b (n, d), row i of one fitting row i of the other.

    Args:
        same: (n, n) boolean; further pairs that fit each other, which do not count as wrong.
    """
    logits = scale * a @ b.T
    if same is not None:
        other = same & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        logits = logits.masked_fill(other, float("-inf"))
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the rows that have a label; 0 where none has."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class EncoderTraining(PretrainingModule[Network]):
    """What the encoders' trainings share: images (b, 3, 64, 64) uint8 become augmented inputs."""

    def __init__(self, network: Network, config: PretrainConfig):
        # With channels last, convolutions are a fifth faster on a CPU.
        super().__init__(network.to(memory_format=torch.channels_last), config)

    def inputs(self, images: Tensor) -> Tensor:
        """Augment images (b, 3, 64, 64) of 0 to 255; the result is in [-1, 1], with channels last."""
        return augmented(images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class CLIPTraining(EncoderTraining[WorldCLIP]):
    """Batch: images, compact caption ids (b, 32), noun labels (b,), place labels (b,).

    Beside its caption, an image learns its noun and its place among all of them, as prompts: what a zero-shot
    classifier asks. Captions alone taught nouns slowly: neither side learns them while the other ignores them. So a
    linear layer, which is not kept, names the noun from either side's features.

    Args:
        classes: (nouns, places, 32) compact ids of a prompt for each noun in each place.
    """

    classes: Tensor

    def __init__(self, network: WorldCLIP, config: PretrainConfig, classes: Tensor):
        super().__init__(network, config)
        self.register_buffer("classes", classes, persistent=False)
        self.head = nn.Linear(network.clip.visual.output_dim, len(classes))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, ids, noun, place = batch
        image = self.network.clip.encode_image(self.inputs(images), normalize=True).float()
        text = self.network.clip.encode_text(ids, normalize=True).float()
        same = (ids[:, None] == ids[None]).all(-1)
        scale = self.network.clip.logit_scale.exp().clamp(max=100)
        captions = contrastive_loss(image, text, scale, same)
        nouns, places = self.class_losses(image, scale, noun, place)
        named = self.named_loss(image, scale, noun)
        self.log_dict({"loss": captions, "noun": nouns, "place": places, "named": named}, prog_bar=True)
        return captions + nouns + places + named

    def named_loss(self, image: Tensor, scale: Tensor, noun: Tensor) -> Tensor:
        """Cross-entropy of the linear layer's nouns, of images and of one prompt for each noun."""
        number, places = self.classes.shape[:2]
        chosen = self.classes[torch.arange(number), torch.randint(places, (number,))]
        text = self.network.clip.encode_text(chosen, normalize=True).float()
        of_text = F.cross_entropy(self.head(scale * text), torch.arange(number, device=text.device))
        return labelled_loss(self.head(scale * image), noun) + of_text

    def class_losses(self, image: Tensor, scale: Tensor, noun: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the noun among nouns in some places each, and of the place among places with some nouns."""
        number, places = self.classes.shape[:2]
        by_noun = self.classes[torch.arange(number)[:, None], torch.randint(places, (number, PROMPTS))]
        by_place = self.classes[torch.randint(number, (places, PROMPTS)), torch.arange(places)[:, None]]
        text = self.network.clip.encode_text(torch.cat([by_noun, by_place]).flatten(0, 1), normalize=True).float()
        classes = F.normalize(text.unflatten(0, (-1, PROMPTS)).mean(1), dim=-1)
        logits = scale * image @ classes.T
        return labelled_loss(logits[:, :number], noun), labelled_loss(logits[:, number:], place)


class InstanceTraining(EncoderTraining[InstanceEncoder]):
    """Batch: two views of each instance, (b, 2, 3, 64, 64), several recolourings of an artwork side by side."""

    SCALE = 20.0

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        views = self.network.image_features(self.inputs(batch.flatten(0, 1))).float()
        first, second = views.unflatten(0, (-1, 2)).unbind(1)
        loss = contrastive_loss(first, second, torch.tensor(self.SCALE, device=first.device))
        self.log("loss", loss, prog_bar=True)
        return loss


class ClassifierTraining(EncoderTraining[Classifier]):
    """Batch: images, noun labels (b,), place labels (b,)."""

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, noun, place = batch
        nouns, places = self.network.logits(self.inputs(images))
        loss = labelled_loss(nouns.float(), noun) + labelled_loss(places.float(), place)
        self.log("loss", loss, prog_bar=True)
        return loss
