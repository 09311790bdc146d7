"""Folder of generated images + reference images -> scores."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dci.captions import LISTS, captioned_files
from dci.concept.concept_file import Concept
from dci.evaluation import metrics
from dci.evaluation.bootstrap import LEVEL, RESAMPLES
from dci.evaluation.encoders import INCEPTION, TINY, Encoder, check_encoder, inception_file, load_encoder
from dci.evaluation.feature_cache import FeatureStore
from dci.evaluation.object_only import in_words
from dci.evaluation.scores import ImageScore, Scores, columns, resampled, summarize
from dci.evaluation.scoring_metadata import BootstrapMetadata, KidMetadata, ScoringMetadata
from dci.samples.reader import SampledImage, concept_files, read_samples, report_content
from ldm.errors import UserError
from ldm.images import list_images, report_not_used
from ldm.pretraining.scenes import PLACES
from ldm.shipped import find


@dataclass(frozen=True)
class Encoders:
    """The encoders that scores are made with."""

    clip: Encoder  # CLIP-T and CLIP-I
    instance: Encoder  # DINO-I
    kid: Encoder  # KID
    classifier: Encoder | None = None  # the embedded world's nouns and places


def load_encoders(clip: str = TINY, instance: str = TINY, kid: str | None = None, device: str = "cpu") -> Encoders:
    """Load encoders by their names; see `dci.evaluation.encoders`.

    Args:
        kid: None: Inception where its weights are on this machine, or else `instance`.

    With `clip` tiny, the embedded classifier counts the right nouns and places, too.

    Raises:
        UserError: no such encoder, or its weights are out of reach.
    """
    clip_encoder = load_encoder(clip, "clip", device)
    if clip_encoder.text is None:
        raise UserError(f"the encoder {clip} reads no texts: give a CLIP for CLIP-T")
    instance_encoder = load_encoder(instance, "instance", device)
    if kid is None:
        kid = INCEPTION if inception_file() and TINY not in (clip, instance) else instance
    known = {clip: clip_encoder} if clip != TINY else {}
    known |= {instance: instance_encoder}
    classifier = load_encoder(TINY, "classifier", device) if clip == TINY else None
    return Encoders(clip_encoder, instance_encoder, known.get(kid) or load_encoder(kid, "instance", device), classifier)


def check_encoders(clip: str = TINY, instance: str = TINY, kid: str | None = None) -> None:
    """Check the names of encoders before long work; nothing is loaded, no hub is asked.

    Raises:
        UserError: no such encoder; a folder, file or package that it needs is missing; `clip` can read no texts.
    """
    for name in dict.fromkeys(filter(None, (clip, instance, kid))):
        check_encoder(name)
    if clip.partition(":")[0] in ("timm", "dinov2", "dreamsim", INCEPTION):
        raise UserError(f"the encoder {clip} reads no texts: give a CLIP for CLIP-T")


def recorded_references(folder: str | Path) -> list[Path]:
    """Return the folders of the reference images that a folder's concept was learned from.

    Raises:
        UserError: `prompts.json` does not lead there.
    """
    files = concept_files(folder)
    named = [name for file in files if find(file).is_file() for name in Concept.load(file).trained_on.images]
    folders = [Path(name) for name in dict.fromkeys(named) if Path(name).is_dir()]
    if not folders:
        why = f"its concept {files[0]}, or that one's images, are not there" if files else "it names no concept file"
        raise UserError(f"{folder} does not lead to reference images ({why}): give their folder as references=")
    return folders


def check_images(
    folder: str | Path, references: Sequence[str | Path] | None = None, regularization: str | Path | None = None
) -> None:
    """Raise UserError where `evaluate_folder` would find no images to compare with; only names are read."""
    for one in recorded_references(folder) if references is None else references:
        list_images(one)
    _real_images(regularization, lambda line: None)


@dataclass(frozen=True)
class Scoring:
    """Which scores a folder gets, and how they are computed."""

    regularization: str | Path | None = None  # folder of real images of the class, for KID; None: no KID
    class_nouns: Sequence[str] = ()  # see `read_samples`
    scaled_text_score: bool = False  # add Custom Diffusion's 2.5 max(cos, 0) as `clip_t_w2.5`
    batch_size: int = 32  # images that an encoder takes at a time
    resamples: int = RESAMPLES  # of the bootstrap
    seed: int = 0  # of the bootstrap
    object_only: bool = False  # let CLIP-I and DINO-I see the object alone where a mask lies beside an image


@dataclass(frozen=True)
class ScoringObservers:
    """Functions that are called while a folder is scored."""

    progress: Callable[[int], object] = lambda number: None  # gets how many more images an encoder has seen
    report: Callable[[str], None] = print  # gets a line on what the folders hold besides the images that are used


def evaluate_folder(
    folder: str | Path,
    references: str | Path | Sequence[str | Path] | None,
    encoders: Encoders,
    scoring: Scoring | None = None,
    cache: str | Path | FeatureStore | None = None,
    observers: ScoringObservers | None = None,
) -> Scores:
    """Score the images of a folder in the layout of `dci.samples.reader`.

    Args:
        references: folder of the concept's images; of several concepts in one image a folder each, and
            the image scores are the mean over the concepts; None: as the concept file records.
        cache: file of features from earlier evaluations, or a store; None: nothing is kept.

    Raises:
        UserError: a folder or file is missing or cannot be used.
    """
    scoring, observers = scoring or Scoring(), observers or ScoringObservers()
    samples = read_samples(folder, scoring.class_nouns)
    references = recorded_references(folder) if references is None else references
    folders = [references] if isinstance(references, (str, Path)) else list(references)
    groups = [_references(one, observers.report) for one in folders]
    files = [sample.file for sample in samples]
    report_content(folder, files, observers.report)
    real = _real_images(scoring.regularization, observers.report)
    store = cache if isinstance(cache, FeatureStore) else FeatureStore(cache)

    def features(encoder: Encoder, files: Sequence[Path], object_only: bool = False) -> Tensor:
        return store.features(encoder, files, scoring.batch_size, observers.progress, object_only)

    images = features(encoders.clip, files)
    values = {metrics.CLIP_T: metrics.text_scores(images, _text_features(encoders.clip, samples, scoring.batch_size))}
    if scoring.scaled_text_score:
        values[metrics.CLIP_T_SCALED] = metrics.scaled_text_scores(values[metrics.CLIP_T])
    for name, encoder in ((metrics.CLIP_I, encoders.clip), (metrics.DINO_I, encoders.instance)):
        seen, *shown = (features(encoder, some, scoring.object_only) for some in (files, *groups))
        values[name] = torch.stack([metrics.image_scores(seen, one) for one in shown]).mean(0)
    scores = [{name: column[i].item() for name, column in values.items()} for i in range(len(samples))]
    if encoders.classifier:
        add_labels(scores, samples, encoders.classifier, features(encoders.classifier, files))
    rows = tuple(ImageScore(str(s.file), s.prompt, s.text, s.noise, own) for s, own in zip(samples, scores, strict=True))
    summary, metadata = summarize(rows, scoring.resamples, scoring.seed), describe(folder, rows, groups, encoders, scoring)
    if scoring.object_only:
        metadata = replace(metadata, object_only=in_words([file for group in groups for file in group], files))
        observers.report(metadata.object_only)
    if real:
        known, made = (scale_for_kid(features(encoders.kid, part), encoders.kid) for part in (real, files))
        value = metrics.kid(known, made, seed=scoring.seed)
        summary[metrics.KID] = metrics.kid_interval(known, made, columns(rows), value, scoring.resamples, scoring.seed)
        about = KidMetadata(encoders.kid.name, str(scoring.regularization), len(known), value.subset_size, value.std)
        metadata = replace(metadata, kid=about)
    return Scores(rows, summary, metadata)


def describe(
    folder: str | Path, rows: Sequence[ImageScore], groups: list[list[Path]], encoders: Encoders, scoring: Scoring
) -> ScoringMetadata:
    """Return what a report states about how scores were made."""
    return ScoringMetadata(
        folder=str(folder),
        images=len(rows),
        references=tuple(str(file) for group in groups for file in group),
        encoders={role: getattr(encoders, role).name for role in ("clip", "instance", "kid")},
        preprocessing={role: getattr(encoders, role).preprocessing for role in ("clip", "instance", "kid")},
        interval=BootstrapMetadata(LEVEL, scoring.resamples, scoring.seed),
        resampled=resampled(rows),
    )


def scale_for_kid(features: Tensor, encoder: Encoder) -> Tensor:
    """Return features (n, d) as KID takes them: Inception's as they are, others brought to length sqrt(d).

    KID's kernel is made for Inception's scale. What other encoders give differs in scale by orders of magnitude;
    at length sqrt(d) the kernel is (cosine + 1)^3 for all of them.
    """
    if encoder.name == INCEPTION:
        return features
    return F.normalize(features, dim=-1) * features.shape[1] ** 0.5


def add_labels(rows: list[dict], samples: Sequence[SampledImage], classifier: Encoder, logits: Tensor) -> None:
    """Add whether the classifier sees the noun and the place that a prompt names; prompts that name none get nothing.

    Args:
        rows: scores of each image, to be added to.
        logits: of nouns and places side by side (n, nouns + places).

    Raises:
        UserError: the encoder is no classifier.
    """
    from ldm.embedded_encoders import Classifier

    if not isinstance(classifier.module, Classifier):
        raise UserError(f"the encoder {classifier.name} knows no nouns and places: give load_encoder('tiny', 'classifier')")
    nouns, places = classifier.module.nouns, classifier.module.places
    noun, place = (part.argmax(-1).tolist() for part in logits.split([len(nouns), len(places)], -1))
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if asked := _named(sample.text, {name: (name,) for name in nouns}):
            row[metrics.NOUN] = float(nouns[noun[i]] == asked)
        if asked := _named(sample.text, {name: phrases for name, (_, phrases) in PLACES.items()}):
            row[metrics.PLACE] = float(places[place[i]] == asked)


def _named(text: str, phrases: dict[str, Sequence[str]]) -> str | None:
    """The one label that a text names; None where it names none or several."""
    named = [
        label
        for label, ways in phrases.items()
        if any(re.search(rf"\b{re.escape(way)}\b", text, re.IGNORECASE) for way in ways)
    ]
    return named[0] if len(named) == 1 else None


def _text_features(encoder: Encoder, samples: Sequence[SampledImage], batch_size: int) -> Tensor:
    """Features of each image's text (n, d); each text is read once."""
    texts = list(dict.fromkeys(sample.text for sample in samples))
    parts = [encoder.text_features(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    return torch.cat(parts)[[texts.index(sample.text) for sample in samples]]


def _references(folder: str | Path, report: Callable[[str], None]) -> list[Path]:
    files = list_images(folder)
    report_not_used(folder, files, report)
    return files


def _real_images(folder: str | Path | None, report: Callable[[str], None]) -> list[Path]:
    """Return the images of a folder of real ones: listed ones, those that the base model made, or all of them."""
    if folder is None:
        return []
    folder = find(folder)
    if (folder / "images.txt").is_file():
        files = list(captioned_files(folder))
        report_not_used(folder, [*files, *LISTS], report)
        return files
    own = folder / "samples"
    files = list_images(own if own.is_dir() else folder)
    report_content(folder, files, report)
    return files
