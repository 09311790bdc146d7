"""Encoders of images and texts, by name.

    tiny                                       the embedded encoders (64 x 64 px, the embedded world)
    open_clip:ARCHITECTURE/TAG                 open_clip:ViT-B-32/openai; a weights' file in place of the tag; or a folder
    timm:NAME                                  timm:vit_small_patch16_224.dino; timm:NAME/FILE takes the weights from a file
    transformers:NAME                          transformers:openai/clip-vit-base-patch32, or a folder
    dinov2:NAME                                dinov2:vits14, vitb14, vitl14, vitg14, with registers vits14_reg; or a folder
    dreamsim:FOLDER, dreamsim:NAME/FOLDER      the ensemble, or one of dino_vitb16, clip_vitb32, open_clip_vitb32, from where
                                               the authors' weights are unpacked (`dci.evaluation.dreamsim`)
    inception, inception:FILE                  the Inception network of FID and KID; needs the package torch-fidelity

Each brings its own preprocessing: the size, crop, interpolation, mean and deviation that it was trained with.
"""

import hashlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isbuiltin, isfunction
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import extras
from ldm.errors import UserError
from ldm.formats.hub import is_hub_id
from ldm.images import square, to_tensor

TINY = "tiny"
INCEPTION = "inception"
ROLES = ("clip", "instance", "classifier")
"""What the embedded encoders are for; to the libraries' encoders it makes no difference."""

_INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it


@dataclass(frozen=True)
class Encoder:
    """Images, and texts if it has a text tower, to features."""

    name: str
    prepare: Callable[[Image.Image], Tensor]  # RGB image -> (3, h, w) as the network wants it
    image: Callable[[Tensor], Tensor]  # (b, 3, h, w) -> (b, d)
    module: nn.Module  # whose weights these are
    text: Callable[[list[str]], Tensor] | None = None  # texts -> (b, d)
    preprocessing: str = ""  # in words, for reports
    settings: str = ""  # what else features depend on besides the module

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any sizes -> features (b, d), fp32 on the CPU, of whatever length."""
        prepared = [self.prepare(image).to(self._device()) for image in images]
        if len({one.shape for one in prepared}) == 1:
            return self.image(torch.stack(prepared)).float().cpu()
        return torch.cat([self.image(one[None]) for one in prepared]).float().cpu()

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts -> features (b, d), fp32 on the CPU, of whatever length; what is too long is cut.

        Raises:
            UserError: the encoder reads no texts.
        """
        if self.text is None:
            raise UserError(f"the encoder {self.name} reads no texts: give a CLIP for CLIP-T")
        return self.text(list(texts)).float().cpu()

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with whatever features depend on: weights, architecture, preprocessing."""
        digest = hashlib.sha256(json.dumps([self.preprocessing, self.settings]).encode())
        for name, part in self.module.named_modules():
            digest.update(json.dumps([name, type(part).__qualname__, _plain_attributes(part)]).encode())
        for name, tensor in self.module.state_dict().items():
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device


def _plain_attributes(part: nn.Module) -> dict[str, str]:
    """What a module computes with besides its weights, such as its number of heads or its activation."""
    plain = {key: value for key, value in vars(part).items() if not key.startswith("_") and key != "training"}
    kept = {key: value for key, value in plain.items() if isinstance(value, (int, float, str, tuple, type(None)))}
    functions = {key: value.__qualname__ for key, value in plain.items() if isfunction(value) or isbuiltin(value)}
    return {key: str(value) for key, value in sorted((kept | functions).items())}


def load_encoder(name: str, role: str = "clip", device: str = "cpu") -> Encoder:
    """Return an encoder by its name; see the module's docstring.

    Args:
        role: which of the embedded encoders `tiny` is: clip, instance, or classifier, whose features are the logits
            of nouns and places side by side.

    Raises:
        UserError: no such encoder, or its weights are out of reach.
    """
    check_encoder(name)
    library, _, model = name.partition(":")
    if name == TINY:
        return _tiny(role, device)
    if library == INCEPTION:
        return _inception(name, model, device)
    with _clear_errors(name):
        return _LOADERS[library](name, model, device)


def check_encoder(name: str) -> None:
    """Check an encoder's name, before long work: nothing is loaded, no hub is asked.

    Raises:
        UserError: no such encoder; a folder, file or package that it needs is missing.
    """
    library, _, model = name.partition(":")
    if name == TINY:
        return
    if library not in _CHECKS or not (model or name == INCEPTION):
        raise UserError(
            f"no encoder '{name}': expected tiny, open_clip:ViT-B-32/openai, timm:vit_small_patch16_224.dino, "
            "transformers:openai/clip-vit-base-patch32, transformers:FOLDER, dinov2:vits14 or dreamsim:FOLDER"
        )
    package = _PACKAGES.get(library)
    if package and extras.is_missing(package):
        raise UserError(f"the encoder {name}: {extras.how_to_install(package)}")
    with _clear_errors(name):
        _CHECKS[library](name, model)


@contextmanager
def _clear_errors(name: str):
    """The libraries' many ways to fail as one line; of what worked, their warnings are passed on."""
    try:
        with _kept_back() as warned:
            yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"the encoder {name}: {extras.describe(error) or error}") from error
    except Exception as error:  # OSError, RuntimeError, ValueError, KeyError, httpx's, safetensors'
        library = name.partition(":")[0]
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if _out_of_reach(error):
            reason = "the hub cannot be reached and has not left it in its cache"
        raise UserError(
            f"the encoder {name} cannot be loaded ({reason}): check the name, give a local folder or file "
            f"({_LOCAL[library]}), or fetch it once on a machine with network and take the cache along (HF_HOME)"
        ) from error
    for warning in warned:
        warnings.warn(f"{name}: {warning}", stacklevel=3)


_QUIET = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
"""Warnings that are meant for the libraries' authors."""


class _Collector(logging.Handler):
    """Puts the text of each warning into a list."""

    def __init__(self, texts: list[str]):
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


@contextmanager
def _kept_back() -> Iterator[list[str]]:
    """Collect what libraries warn of, through `warnings` or in logs; at the end the list is complete, without repeats."""
    collected: list[str] = []
    handler = _Collector(collected)
    loggers = [logging.root, *(logging.getLogger(name) for name in ("open_clip", "timm", "transformers"))]
    handlers = {logger: logger.handlers[:] for logger in loggers if logger.handlers or logger is logging.root}
    for logger in handlers:
        logger.handlers = [handler]
    hub = logging.getLogger("huggingface_hub")  # it warns of slow downloads alone
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield collected
    finally:
        hub.setLevel(level)
        for logger, before in handlers.items():
            logger.handlers = before
    collected += [str(one.message) for one in caught if not issubclass(one.category, _QUIET)]
    collected[:] = dict.fromkeys(" ".join(re.sub(r"\x1b\[\d*m", "", text).split()) for text in collected)


def _out_of_reach(error: BaseException | None) -> bool:
    """Whether an error goes back to a hub that gave nothing and a cache that has nothing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


_LOCAL = {
    "open_clip": "open_clip:ARCHITECTURE/FILE or open_clip:FOLDER",
    "timm": "timm:NAME/FILE",
    "transformers": "transformers:FOLDER",
    "dinov2": "dinov2:FOLDER",
    "dreamsim": "dreamsim:FOLDER",
    INCEPTION: "inception:FILE",
}


_Network = TypeVar("_Network", bound=nn.Module)


def _frozen(module: _Network, device: str) -> _Network:
    return module.eval().requires_grad_(False).to(device)


def _tiny(role: str, device: str) -> Encoder:
    from ldm.embedded_encoders import SIZE, load_classifier, load_clip, load_instance_encoder, resized

    def prepare(image: Image.Image) -> Tensor:
        return resized(to_tensor(square(image, min(image.size)))[None])[0]

    words = f"middle square, {SIZE} x {SIZE} px"
    if role == "clip":
        clip = _frozen(load_clip(), device)
        return Encoder(
            "tiny CLIP",
            prepare,
            clip.clip.encode_image,
            clip,
            lambda texts: clip.clip.encode_text(clip.tokenize(texts)),
            words,
        )
    if role == "instance":
        instance = _frozen(load_instance_encoder(), device)
        return Encoder("tiny instance encoder", prepare, instance.trunk, instance, None, words)
    classifier = _frozen(load_classifier(), device)
    return Encoder("tiny classifier", prepare, lambda x: torch.cat(classifier.logits(x), -1), classifier, None, words)


def _check_open_clip(name: str, model: str) -> None:
    import open_clip

    architecture, weights = _open_clip_parts(model)
    if weights == "":
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:4]) or "a tag, such as openai"
        raise UserError(f"the encoder {name} names no weights: write open_clip:{architecture}/TAG with {tags}, or a file")
    if weights and weights not in open_clip.list_pretrained_tags_by_model(architecture) and not Path(weights).is_file():
        raise UserError(f"the encoder {name}: '{weights}' is neither a file nor one of open_clip's tags for {architecture}")


def _open_clip_parts(model: str) -> tuple[str, str | None]:
    """The architecture, and the weights' tag or file; None: a folder or the hub has both."""
    if Path(model).is_dir():
        return f"local-dir:{model}", None
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, None
    architecture, _, weights = model.partition("/")
    return architecture, weights


def _open_clip(name: str, model: str, device: str) -> Encoder:
    import open_clip

    architecture, weights = _open_clip_parts(model)
    quick = weights is not None and _wants_quick_gelu(name, architecture, weights)
    clip, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=weights, force_quick_gelu=quick)
    tokenizer = open_clip.get_tokenizer(architecture)
    clip = _frozen(clip, device)
    return Encoder(
        name, prepare, clip.encode_image, clip, lambda texts: clip.encode_text(tokenizer(texts).to(device)), _steps(prepare)
    )


def _wants_quick_gelu(name: str, architecture: str, weights: str) -> bool:
    """Whether weights, a tag's or a file's, were trained with QuickGELU where the architecture itself is built with GELU."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights in tags:
        return bool(get_pretrained_cfg(architecture, weights).get("quick_gelu"))
    kinds = {bool(get_pretrained_cfg(architecture, tag).get("quick_gelu")) for tag in tags}
    if len(kinds) < 2 or f"{architecture}-quickgelu" not in open_clip.list_models():
        return kinds == {True}
    if _is_program(weights):  # as OpenAI publishes its weights, and nobody else
        return True
    warnings.warn(
        f"the file does not say its activation, and the architecture is built with GELU: if the weights are OpenAI's or "
        f"others trained with QuickGELU, write open_clip:{architecture}-quickgelu/FILE",
        stacklevel=2,
    )
    return False


def _is_program(file: str) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _check_timm(name: str, model: str) -> None:
    import timm

    architecture, file = _timm_parts(model)
    if file and not Path(file).is_file():
        raise UserError(f"the encoder {name}: no file {file}")
    if ":" not in architecture and not timm.is_model(architecture):
        raise UserError(f"the encoder {name}: timm has no model '{architecture}', such as vit_small_patch16_224.dino")


def _timm_parts(model: str) -> tuple[str, str]:
    """The architecture, and the weights' file; "": timm knows where they are."""
    if model.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return model, ""
    architecture, _, file = model.partition("/")
    return architecture, file


def _timm(name: str, model: str, device: str) -> Encoder:
    import timm
    from timm.data import create_transform, resolve_model_data_config

    architecture, file = _timm_parts(model)
    network = timm.create_model(
        architecture, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": file} if file else None
    )
    config = resolve_model_data_config(network)
    if architecture.endswith(".dino"):
        # DINO's own evaluation, DreamBooth's and Custom Diffusion's resize to 256 and crop 224; timm to 248.
        config["crop_pct"] = 224 / 256
    prepare = create_transform(**config, is_training=False)
    return Encoder(name, prepare, network, _frozen(network, device), None, _steps(prepare))


def _check_transformers(name: str, model: str) -> None:
    if not (Path(model).is_dir() or is_hub_id(model)):
        raise UserError(f"the encoder {name}: no folder {model}")


def _transformers(name: str, model: str, device: str) -> Encoder:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # DINO's files have no pooler, which is not used: it would be made anew, at random.
    bare = {"add_pooling_layer": False} if AutoConfig.from_pretrained(model).model_type in ("vit", "deit") else {}
    network = _frozen(AutoModel.from_pretrained(model, **bare), device)
    processor = AutoImageProcessor.from_pretrained(model)

    def prepare(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    words = f"{type(processor).__name__} of {model}"
    settings = str(processor.to_dict())
    if not hasattr(network, "get_text_features"):  # a ViT such as DINO: its class token
        return Encoder(
            name, prepare, lambda x: network(pixel_values=x).last_hidden_state[:, 0], network, None, words, settings
        )
    tokenizer = AutoTokenizer.from_pretrained(model)

    def text(texts: list[str]) -> Tensor:
        length = getattr(network.config.text_config, "max_position_embeddings", None)
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        return _pooled(network.get_text_features(**tokens))

    return Encoder(
        name, prepare, lambda x: _pooled(network.get_image_features(pixel_values=x)), network, text, words, settings
    )


_DINOV2_SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}


def _check_dinov2(name: str, model: str) -> None:
    size, _, registers = model.partition("_")
    if not Path(model).is_dir() and (size not in _DINOV2_SIZES or registers not in ("", "reg")):
        raise UserError(
            f"the encoder {name}: expected one of {', '.join(_DINOV2_SIZES)}, with _reg behind it for registers, or a folder"
        )


def _dinov2(name: str, model: str, device: str) -> Encoder:
    """DINOv2's normed class token, in transformers' port of it; a folder is one of that library's."""
    if Path(model).is_dir():
        return _transformers(name, model, device)
    size, _, registers = model.partition("_")
    kind = "dinov2-with-registers" if registers else "dinov2"
    return _transformers(name, f"facebook/{kind}-{_DINOV2_SIZES[size]}", device)


def _check_dreamsim(name: str, model: str) -> None:
    from dci.evaluation.dreamsim import VARIANTS

    _, folder = _dreamsim_parts(model)
    if not Path(folder).is_dir() or not folder:
        raise UserError(
            f"the encoder {name}: no folder '{folder}' with the authors' weights: give dreamsim:FOLDER, or "
            f"dreamsim:NAME/FOLDER with one of {', '.join(VARIANTS)}"
        )


def _dreamsim_parts(model: str) -> tuple[str, str]:
    """The published model, and the folder of its weights."""
    from dci.evaluation.dreamsim import VARIANTS

    variant, _, folder = model.partition("/")
    return (variant, folder) if variant in VARIANTS else ("ensemble", model)


def _dreamsim(name: str, model: str, device: str) -> Encoder:
    from dci.evaluation.dreamsim import SIZE, load_dreamsim, prepare

    variant, folder = _dreamsim_parts(model)
    network = _frozen(load_dreamsim(variant, folder), device)
    return Encoder(f"DreamSim {variant}", prepare, network, network, None, f"squeezed to {SIZE} x {SIZE} px, bicubic")


_LOADERS = {
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
    "dinov2": _dinov2,
    "dreamsim": _dreamsim,
}


def _pooled(output) -> Tensor:
    """transformers 5 wraps what 4 returned as a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


def inception_file() -> Path | None:
    """Return the weights of KID's Inception network, where torch-fidelity or torchmetrics left them."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    return file if file.is_file() else None


def _check_inception(name: str, file: str) -> None:
    weights = Path(file) if file else inception_file()
    if weights is None or not weights.is_file():
        raise UserError(
            f"the encoder {name}: no weights {weights or _INCEPTION_FILE}: give inception:FILE, or put the "
            f"file into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        )


def _inception(name: str, file: str, device: str) -> Encoder:
    weights = Path(file) if file else inception_file()
    assert weights is not None  # as checked
    with _clear_errors(name):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        torch.load(weights, weights_only=True)  # torch-fidelity unpickles whatever there is: let it see tensors alone
        network = _frozen(FeatureExtractorInceptionV3("inception", ["2048"], str(weights)), device)

    def prepare(image: Image.Image) -> Tensor:
        return (to_tensor(square(image, min(image.size))) * 127.5 + 127.5).round().byte()

    words = "middle square, resized to 299 x 299 px as TensorFlow 1 did"
    return Encoder(INCEPTION, prepare, lambda x: network(x)[0], network, None, words)


_CHECKS = {
    "open_clip": _check_open_clip,
    "timm": _check_timm,
    "transformers": _check_transformers,
    "dinov2": _check_dinov2,
    "dreamsim": _check_dreamsim,
    INCEPTION: _check_inception,
}

_PACKAGES = {"timm": "timm", "transformers": "transformers", "dinov2": "transformers", INCEPTION: "torch_fidelity"}
"""What an encoder needs of the extras."""


def _steps(transform) -> str:
    """A torchvision transform in words."""
    steps = getattr(transform, "transforms", [transform])
    return ", ".join(" ".join(str(step).split()) for step in steps if not isfunction(step))
