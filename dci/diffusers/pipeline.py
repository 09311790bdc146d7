"""A pipeline of diffusers with DCI: its own class, call arguments and outputs, and DCI's beside them."""

import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dci.concept.concept_file import Concept
from dci.concept.prompts import BranchPrompts, mentions
from dci.diffusers.branch import AuxiliaryBranch, Noising
from dci.diffusers.loaded import LoadedConcept, load, loaded_concept, unload
from dci.diffusers.model import original
from dci.diffusers.notes import call_notes
from dci.diffusers.processor import check_processors
from dci.diffusers.prompts import parse_for, together
from dci.diffusers.stand_in import StandIn, standing_in
from dci.diffusers.tokens import missing_tokens
from dci.dual_branch.attention_maps import MapsCallback
from dci.dual_branch.options import DUAL_BRANCH, checked_dual_branch
from ldm import extras
from ldm.errors import Note, UserError
from ldm.texts import did_you_mean

SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)
"""Pipelines of diffusers that DCI is known to work in."""

_PROMPTS, _NEGATIVE = ("prompt", "prompt_2"), ("negative_prompt", "negative_prompt_2")  # those with a 2 are SDXL's


class DCIPipeline:
    """What is added to a pipeline of diffusers: a concept, and DCI in its call.

    `from_pipe` and `from_pretrained` return an object that is both a `DCIPipeline` and of the pipeline's own class, so
    that everything diffusers does with pipelines it does with this one.
    """

    _branch: AuxiliaryBranch | None = None  # of the call in progress
    _stand_ins: ExitStack | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Any:
        """Load a pipeline with `diffusers.DiffusionPipeline.from_pretrained` and give it DCI.

        Raises:
            UserError: diffusers is not installed, or it is a pipeline that DCI does not know.
        """
        return DCIPipeline.from_pipe(_diffusers().DiffusionPipeline.from_pretrained(model, **options))

    @classmethod
    def from_pipe(cls, pipe: Any, **components: Any) -> Any:
        """Return a pipeline like `pipe`, on the same networks, with DCI.

        Args:
            pipe: a Stable Diffusion pipeline; a concept that was loaded through another one on the same UNet is there.
            components: such as `scheduler`, in place of the pipeline's.

        Raises:
            UserError: diffusers is not installed, or it is a pipeline that DCI does not know.
        """
        _diffusers()
        kind = type(pipe)
        if not any(parent.__name__ in SUPPORTED for parent in kind.__mro__):
            raise UserError(f"{kind.__name__}: expected one of {', '.join(SUPPORTED)}")
        new = object.__new__(kind if isinstance(pipe, DCIPipeline) else _with_dci(kind))
        new.__dict__.update(pipe.__dict__)
        for name, component in components.items():
            if name not in pipe.components:
                raise UserError(f"{kind.__name__} has no component '{name}': expected {', '.join(pipe.components)}")
            setattr(new, name, component)
        return new

    @property
    def concept(self) -> Concept | None:
        """The concept that the pipeline holds, None if there is none."""
        found = loaded_concept(self)
        return found.concept if found else None

    @property
    def auxiliary_latents(self) -> Tensor | None:
        """The auxiliary branch's latents (b, c, h, w) while both branches run, for callbacks; else None."""
        return self._branch.latents if self._branch and self._branch.running else None

    def load_concept(
        self,
        *files: str | Path | Concept,
        class_noun: str | None = None,
        trigger: str | None = None,
        strength: float = 1.0,
        check_base: bool = True,
    ) -> None:
        """Put a concept into the pipeline: weights into UNet and text encoder, tokens into tokenizer and embeddings.

        Args:
            files: a concept file of ours, or files of other programs, as scripts/import_concept.py takes them.
            class_noun: the ordinary word for the concept, where such files do not have it.
            trigger: the words that stand for it in prompts, where no token was learned for it.
            strength: factor on what the concept changes in the weights; 0 leaves the base's, 1 is as it was learned.
            check_base: False takes a concept of another base model than the pipeline's, if its weights fit.

        Raises:
            UserError: a file cannot be used, the base is another, or a concept is loaded already.
        """
        concept = files[0] if len(files) == 1 and isinstance(files[0], Concept) else files
        load(self, concept, class_noun, trigger, strength, check_base)

    def unload_concept(self) -> None:
        """Take the concept out again; the pipeline is as it was before `load_concept`.

        Raises:
            UserError: there is none, or its weights have been changed since.
        """
        unload(self)

    def parse(self, prompt: str, auxiliary_noun: str | None = None) -> BranchPrompts:
        """Return both branches' prompts, and where the concept and its noun stand in the pipeline's tokens.

        Raises:
            UserError: no concept is loaded, or the prompt does not name it.
        """
        return parse_for(self, self._loaded().concept.names, prompt, auxiliary_noun)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        dci: bool = True,
        auxiliary_noun: str | None = None,
        auxiliary_latents: Tensor | None = None,
        auxiliary_prompt_embeds: Tensor | None = None,
        auxiliary_pooled_prompt_embeds: Tensor | None = None,
        branch_prompts: BranchPrompts | Sequence[BranchPrompts] | None = None,
        maps: MapsCallback | None = None,
        **given: Any,
    ) -> Any:
        """Call the pipeline with DCI.

        Args:
            prompt: names the concept V* or {}, or by its modifier tokens.
            args, given: the pipeline's own arguments, and DCI's: the fields of
                `dci.dual_branch.integration.DualBranch` (agg_time, agg_lambda, gain, ...).
            dci: False samples the fine-tuned model plainly; then prompts need not name the concept.
            auxiliary_noun: a noun that the base model knows well, for the auxiliary branch; None: the class noun.
            auxiliary_latents: N(0, 1) noise that the auxiliary branch starts from (b, c, h, w); None: drawn from a stream
                that follows from `generator`.
            branch_prompts: of each prompt, from `parse`, where `prompt_embeds` stands in the prompts' place.
            auxiliary_prompt_embeds, auxiliary_pooled_prompt_embeds: with those, the auxiliary prompts' embeddings, and in
                SDXL their pooled ones; None: encoded from `branch_prompts`.
            maps: gets a `dci.dual_branch.attention_maps.BranchMaps` for every integrated layer while both branches run.

        Returns:
            What the pipeline returns.

        Raises:
            UserError: no concept is loaded, a prompt does not name it, or an argument that cannot be used.
        """
        settings = {name: given.pop(name) for name in DUAL_BRANCH & given.keys()}
        call = super().__call__
        arguments = _bound(call, prompt, args, given)
        loaded = self._loaded() if dci else None
        notes = call_notes(self, arguments, inspect.signature(call).parameters["guidance_scale"].default)
        if dci and auxiliary_latents is not None and settings.get("shared_noise"):
            notes.append("auxiliary_latents has no effect: with shared_noise both branches start from the same noise")
        _warn(*notes)
        if loaded is None:
            return call(**self._named(arguments, (*_PROMPTS, *_NEGATIVE)))
        dual = checked_dual_branch(settings)
        self._check(arguments)
        parsed = self._branches(arguments, auxiliary_noun, branch_prompts)
        arguments = self._named(arguments, (*_PROMPTS, *_NEGATIVE))
        branches = [together(*pair) if len(pair) > 1 else pair[0] for pair in zip(*parsed.values(), strict=True)]
        number = arguments.get("num_images_per_prompt") or 1
        rows = [branch for branch in branches for _ in range(number)]
        branch = AuxiliaryBranch(self, loaded, dual, rows, auxiliary_latents, arguments.get("generator"), maps, arguments)
        branch.prompt = {name: [prompts.auxiliary for prompts in own] for name, own in parsed.items()}
        if auxiliary_prompt_embeds is not None:
            branch.prompt = self._embedded(auxiliary_prompt_embeds, auxiliary_pooled_prompt_embeds)
        branch.own_gain = settings.get("gain") is None
        with self._running(branch):
            found = call(**arguments)
        _warn(*[branch.note] if branch.note else [])
        return found

    def encode_prompt(self, *args: Any, **given: Any) -> Any:
        """As the pipeline's own; the auxiliary prompts are encoded besides, in the same way."""
        encode, encoder = super().encode_prompt, self.text_encoder
        # With clip_skip, diffusers looks for the text_model that transformers' encoders were wrapped around before 5.0.
        own = {} if hasattr(encoder, "text_model") else {"text_encoder": StandIn(encoder, call=encoder, text_model=encoder)}
        with standing_in(self, **own):
            encoded = encode(*args, **given)
            if self._branch is not None:
                self._branch.encode(encode, args, given)
        return encoded

    def prepare_latents(self, *args: Any, **given: Any) -> Any:
        """As the pipeline's own; the auxiliary branch's latents are prepared likewise."""
        if self._branch is None:
            return super().prepare_latents(*args, **given)
        scheduler, noised = self.scheduler, []

        def add_noise(samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            noised.append(Noising(samples, noise, timesteps))
            return scheduler.add_noise(samples, noise, timesteps)

        with standing_in(self, scheduler=StandIn(scheduler, add_noise=add_noise)):
            prepared = super().prepare_latents(*args, **given)
        self._branch.begin(prepared, noised[-1] if noised else None)
        return prepared

    def prepare_mask_latents(self, *args: Any, **given: Any) -> Any:
        """As the pipeline's own; the auxiliary branch keeps what the mask keeps."""
        prepared = super().prepare_mask_latents(*args, **given)
        if self._branch is not None:
            self._branch.mask = prepared[0]
        return prepared

    def prepare_extra_step_kwargs(self, *args: Any, **given: Any) -> dict[str, Any]:
        """As the pipeline's own; the auxiliary branch's steps take the same options."""
        options = super().prepare_extra_step_kwargs(*args, **given)
        if self._branch is not None:
            self._branch.step_options = options
            if self._branch.latents is None:
                self._branch.begin_as_given()
        return options

    def maybe_free_model_hooks(self) -> None:
        """As the pipeline's own, which looks for the networks themselves: the stand-ins go first."""
        if self._stand_ins is not None:
            self._stand_ins.close()
        super().maybe_free_model_hooks()

    @contextmanager
    def _running(self, branch: AuxiliaryBranch) -> Iterator[None]:
        """Let the networks be called through the auxiliary branch."""
        own = {"unet": StandIn(self.unet, call=partial(branch.predict, self.unet))}
        if getattr(self, "controlnet", None) is not None:
            own["controlnet"] = StandIn(self.controlnet, call=partial(branch.control, self.controlnet))
        with ExitStack() as stack:
            stack.callback(branch.end)
            stack.enter_context(standing_in(self, **own))
            self._branch, self._stand_ins = branch, stack
            try:
                yield
            finally:
                del self._branch, self._stand_ins

    def _loaded(self) -> LoadedConcept:
        found = loaded_concept(self)
        if found is None:
            raise UserError("no concept is loaded: call load_concept(file) first, or give dci=False to sample without DCI")
        if lost := missing_tokens(self, found.tokens):
            raise UserError(
                f"the pipeline's tokenizer has lost the concept's {', '.join(lost)}: call unload_concept() and load it again"
            )
        return found

    def _check(self, arguments: dict[str, Any]) -> None:
        if any(arguments.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds")):
            raise UserError("DCI does not go together with an IP-Adapter: leave its image out, or give dci=False")
        if getattr(self.scheduler, "alphas_cumprod", None) is None:
            raise UserError(
                f"{type(self.scheduler).__name__} does not step by training timesteps, which DCI's agg_time counts: "
                "expected a scheduler of Stable Diffusion, such as DPMSolverMultistepScheduler, or give dci=False"
            )
        check_processors(original(self.unet))

    def _named(self, arguments: dict[str, Any], prompts: Sequence[str]) -> dict[str, Any]:
        """Write the concept's tokens out in prompts that name it, of the arguments that are called so."""
        if loaded_concept(self) is None:
            return arguments
        names, written = self._loaded().concept.names, {}
        for argument in prompts:
            if (given := arguments.get(argument)) is not None:
                texts = [self.parse(text).concept if mentions(text, names) else text for text in _listed(given)]
                written[argument] = texts[0] if isinstance(given, str) else texts
        return arguments | written

    def _embedded(self, embeds: Tensor, pooled: Tensor | None) -> dict[str, Tensor]:
        """The auxiliary prompts' embeddings as encode_prompt takes them."""
        if "text_encoder_2" not in self.components:
            return {"prompt_embeds": embeds}
        if pooled is None:
            raise UserError(
                "SDXL reads a pooled text besides: give auxiliary_pooled_prompt_embeds with auxiliary_prompt_embeds"
            )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _branches(
        self,
        arguments: dict[str, Any],
        auxiliary_noun: str | None,
        given: BranchPrompts | Sequence[BranchPrompts] | None,
    ) -> dict[str, list[BranchPrompts]]:
        """Return both branches' prompts, of each of the call's arguments that hold some."""
        texts = {name: _listed(arguments[name]) for name in _PROMPTS if arguments.get(name) is not None}
        if "prompt" in texts and given is None:
            if any(len(own) != len(texts["prompt"]) for own in texts.values()):
                raise UserError(f"{len(texts['prompt'])} prompts, {len(texts['prompt_2'])} in prompt_2: expected as many")
            return {name: [self.parse(text, auxiliary_noun) for text in own] for name, own in texts.items()}
        if texts or given is None:
            raise UserError(
                "prompt_embeds do not tell where the concept stands: give the prompts that they encode as "
                "branch_prompts=pipe.parse(prompt), and no prompt"
            )
        if auxiliary_noun is not None:
            raise UserError("auxiliary_noun belongs to the prompts: branch_prompts=pipe.parse(prompt, auxiliary_noun)")
        return {"prompt": [given] if isinstance(given, BranchPrompts) else list(given)}


def _warn(*notes: str) -> None:
    """Issue notes as warnings that point to the caller's line."""
    for note in notes:
        warnings.warn(note, Note, stacklevel=3)


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _bound(call: Any, prompt: Any, args: tuple, given: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline's call arguments by their names; diffusers itself passes over names that it does not know."""
    parameters = inspect.signature(call).parameters
    known = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for name in given:
        if name not in known and name not in ("callback", "callback_steps"):
            raise UserError(
                f"unknown argument '{name}' of the pipeline's call{did_you_mean(name, [*known, *sorted(DUAL_BRANCH)])}"
            )
    positional = {known[0]: prompt} | dict(zip(known[1:], args, strict=False))
    twice = [name for name in positional if name in given]
    if twice or len(args) >= len(known):
        raise UserError(f"{len(args) + 1} arguments without names, of {len(known)}: {', '.join(twice)} given twice")
    return positional | given


def _diffusers() -> Any:
    """Return the library.

    Raises:
        UserError: it is not installed.
    """
    if extras.is_missing("diffusers"):
        raise UserError(extras.how_to_install("diffusers"))
    return importlib.import_module("diffusers")


@cache
def _with_dci(kind: type) -> type:
    """Return a pipeline's class with DCI.

    It has the pipeline's name, which saved pipelines hold and diffusers looks up.
    """
    return type(kind.__name__, (DCIPipeline, kind), {"__doc__": DCIPipeline.__doc__, "__module__": __name__})
