"""The auxiliary branch of one call of a pipeline.

The pipeline's own loop is the concept branch. Beside it the auxiliary branch has its own latents, its own copy of the
scheduler and its own noise, so that the concept branch meets the same numbers with DCI and without. While both
branches run, the auxiliary rows go through the UNet, and a ControlNet, in the same batch as the pipeline's:

    shared guidance     [unconditional, concept | auxiliary]
    separate guidance   [unconditional, concept | unconditional of the auxiliary branch, auxiliary]
    no guidance         [concept | auxiliary]

What is behind the bar is added here, and taken off the output.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dci.concept.prompts import BranchPrompts
from dci.diffusers.loaded import LoadedConcept
from dci.diffusers.noise import forked, like
from dci.diffusers.processor import Integration, processors
from dci.dual_branch.attention_maps import MapsCallback, observer
from dci.dual_branch.integration import BASE, DualBranch, TokenMasks, calibrated_gain, integrating_attend
from dci.dual_branch.layer_selection import integrated_layers
from ldm.attention import Attend, attend
from ldm.errors import UserError
from ldm.sampling_loop import guide


class Noising(NamedTuple):
    """A call of a scheduler's add_noise."""

    samples: Tensor
    noise: Tensor
    timesteps: Tensor


class Rows(NamedTuple):
    """The numbers of rows in a network's batch."""

    own: int  # from the pipeline
    added: int  # of the auxiliary branch
    images: int  # of each kind

    @property
    def concept(self) -> slice:
        """The rows of the concept branch: the last of the pipeline's own."""
        return slice(self.own - self.images, self.own)

    @property
    def auxiliary(self) -> slice:
        """The rows of the auxiliary branch: the last of those that were added."""
        return slice(self.own + self.added - self.images, self.own + self.added)


class AuxiliaryBranch:
    """The auxiliary branch, which runs beside a pipeline's loop.

    Args:
        pipe: the pipeline.
        prompts: of every image, in the pipeline's order.
        latents: N(0, 1) noise to begin with, in place of drawn noise.
        generator: the pipeline's; the branch's own noise follows from its state and leaves it as it is.
        maps: shown the branch weights and attention maps.
        arguments: of the pipeline's call.
    """

    def __init__(
        self,
        pipe: Any,
        loaded: LoadedConcept,
        dual: DualBranch,
        prompts: list[BranchPrompts],
        latents: Tensor | None,
        generator: Any,
        maps: MapsCallback | None,
        arguments: dict[str, Any],
    ):
        self.pipe, self.loaded, self.dual, self.prompts, self.maps = pipe, loaded, dual, prompts, maps
        self.arguments = arguments
        self.generator, self.given = generator, latents
        self.prompt: dict[str, Any] = {}  # the auxiliary prompts, or their embeddings, as encode_prompt takes them
        self.own_gain = False  # the gain follows the size of the image
        self.context: Tensor | None = None  # (b, l, d)
        self.pooled: Tensor | None = None  # (b, d) of SDXL's second text encoder
        self.latents: Tensor | None = None  # (b, c, h, w)
        self.scheduler: Any = None  # the branch's own, from the first step on
        self.step_options: dict[str, Any] = {}  # what the pipeline hands to its scheduler's step
        self.mask: Tensor | None = None  # where inpainting paints, (rows, 1, h, w)
        self._kept: Tensor | None = None  # latents of the image that inpainting keeps
        self._noise: Tensor | None = None  # that it is noised with
        self._residuals: tuple[list[Tensor], Tensor] | None = None  # a ControlNet's, of the added rows
        self._masks: TokenMasks | None = None
        self._moved = False  # the latents have been stepped since the kept part was put back
        self._phase = ExitStack()  # holds our attention processors while both branches run
        self._first = True  # no step has been taken
        self.note: str | None = None  # that both branches never ran
        self.running = False  # both branches, in the last step

    def begin(self, prepared: Tensor | tuple[Tensor, ...], noised: Noising | None) -> None:
        """Make the first latents from those that the pipeline prepared for the concept branch.

        Args:
            prepared: the latents, and in inpainting their noise and the image's latents.
            noised: how the pipeline got them from an image; None: they are noise alone.

        Raises:
            UserError: no step is left to take, or the prompts are not as many as the images.
        """
        latents, *more = prepared if isinstance(prepared, tuple) else (prepared,)
        if not len(latents):
            raise UserError("strength leaves none of the steps: raise strength= or num_inference_steps=")
        if len(latents) != len(self.prompts):
            raise UserError(f"{len(self.prompts)} prompts for {len(latents)} images: expected one prompt for each")
        self.generator = forked(self.generator, latents.device)
        if self.dual.shared_noise or self.arguments.get("denoising_start") is not None:
            # The noise of latents that were denoised before is not known.
            self._noise = noised.noise if noised else more[0] if more else None
            self.latents = latents.clone()
        else:
            self._noise = like(latents, self.given, self.generator)
            scheduler = self.pipe.scheduler
            self.latents = (
                scheduler.add_noise(noised.samples, self._noise, noised.timesteps)
                if noised
                else self._noise * scheduler.init_noise_sigma
            )
        self._kept = more[1] if len(more) > 1 else None

    def begin_as_given(self) -> None:
        """Begin with latents that the pipeline takes as they are; it prepares none then.

        They are at the first step's noise level already, so the auxiliary branch begins with the same ones, or with its own.
        """
        own = self.arguments["latents"]
        self.generator = forked(self.generator, own.device)
        self.latents = own.clone() if self.given is None else self.given.to(own).expand_as(own)

    def encode(self, encode_prompt: Callable, args: tuple, given: dict[str, Any]) -> None:
        """Encode the auxiliary prompts as the pipeline encodes its own.

        Args:
            encode_prompt: the pipeline's.
            args, given: what the pipeline called it with.
        """
        arguments = inspect.signature(encode_prompt).bind(*args, **given).arguments
        others = {name: None for name in arguments if "prompt" in name and name != "num_images_per_prompt"}
        encoded = encode_prompt(**{**arguments, **others, **self.prompt, "do_classifier_free_guidance": False})
        self.context, self.pooled = encoded[0], encoded[2] if len(encoded) > 2 else None

    def is_dual(self, timestep: Tensor) -> bool:
        """Whether both branches run at a timestep; once they do not, the UNet is as it was."""
        number = self.pipe.scheduler.config.num_train_timesteps
        dual = self.dual.is_dual(float(timestep), number)
        if not dual:
            if self._first and self.dual.agg_time > 0:
                self.note = (
                    f"the first timestep is {float(timestep):g}, and both branches run above "
                    f"{number - number * self.dual.agg_time:g}: this is plain sampling; raise agg_time="
                )
            self.end()
        self._first = False
        return dual

    def end(self) -> None:
        """Put the UNet's own attention processors back."""
        self._phase.close()
        self.running = False

    def control(self, network: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given: Any) -> Any:
        """Call a ControlNet: the pipeline gets its rows' residuals, the rest waits for the UNet."""
        if not self.is_dual(timestep):
            return network(sample, timestep, encoder_hidden_states=encoder_hidden_states, **given)
        rows = self._rows(sample)
        down, middle = network(
            torch.cat([sample, self._inputs(sample, timestep, rows)]),
            timestep,
            encoder_hidden_states=torch.cat([encoder_hidden_states, self._contexts(encoder_hidden_states, rows)]),
            **self._widened(given, rows),
        )
        self._residuals = [residual[rows.own :] for residual in down], middle[rows.own :]
        return [residual[: rows.own] for residual in down], middle[: rows.own]

    def predict(self, network: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **given: Any) -> Any:
        """Call the UNet for both branches, step the auxiliary one, and return the pipeline's rows."""
        if not self.is_dual(timestep):
            return network(sample, timestep, encoder_hidden_states=encoder_hidden_states, **given)
        if not self.running:
            self._phase.enter_context(processors(network, self.loaded.layers))
            self.running = True
        rows = self._rows(sample)
        given = self._widened(given, rows)
        self._put_residuals(given, rows)
        integration = self._integration(rows, int(timestep), self.latents.shape[-2:])
        given["cross_attention_kwargs"] = {**(given.get("cross_attention_kwargs") or {}), "dci": integration}
        output = network(
            torch.cat([sample, self._inputs(sample, timestep, rows)]),
            timestep,
            encoder_hidden_states=torch.cat([encoder_hidden_states, self._contexts(encoder_hidden_states, rows)]),
            **given,
        )[0]
        self._step(output, timestep, rows)
        return (output[: rows.own],)

    def _rows(self, sample: Tensor) -> Rows:
        images, own = len(self.latents), len(sample)
        if own not in (images, 2 * images):
            raise UserError(f"the pipeline predicts {own} rows for {images} images: DCI knows one and two for each")
        return Rows(own, own if own > images and not self.dual.shared_guidance else images, images)

    def _inputs(self, sample: Tensor, timestep: Tensor, rows: Rows) -> Tensor:
        """The added rows' latents; what the pipeline's have in further channels is theirs too."""
        if self.scheduler is None:
            self.scheduler = copy.deepcopy(self.pipe.scheduler)
        if self._moved and self._kept is not None:
            paint = self.mask[-rows.images :]
            at = torch.as_tensor([timestep], device="cpu")
            kept = self.scheduler.add_noise(self._kept, self._noise, at)
            self.latents = (1 - paint) * kept + paint * self.latents
        self._moved = False
        x = self.scheduler.scale_model_input(self.latents, timestep)
        x = torch.cat([x] * (rows.added // rows.images))
        return torch.cat([x, sample[-rows.added :, x.shape[1] :]], dim=1)

    def _contexts(self, own: Tensor, rows: Rows) -> Tensor:
        if own.shape[1] != self.context.shape[1]:
            raise UserError(
                f"prompt_embeds has {own.shape[1]} tokens, auxiliary_prompt_embeds {self.context.shape[1]}: expected as many"
            )
        return self._beside(own, self.context, rows)

    @staticmethod
    def _beside(own: Tensor, auxiliary: Tensor, rows: Rows) -> Tensor:
        """The auxiliary branch's text, behind the pipeline's unconditional one where the guidance is separate."""
        auxiliary = auxiliary.to(own.dtype)
        return auxiliary if rows.added == rows.images else torch.cat([own[: rows.images], auxiliary])

    def _widened(self, given: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """What else goes to a network, with rows for the auxiliary branch wherever the pipeline has some."""
        given = {name: _widened(value, rows) for name, value in given.items()}
        added = given.get("added_cond_kwargs") or {}
        if self.pooled is not None and "text_embeds" in added:
            own = added["text_embeds"][: rows.own]
            added["text_embeds"] = torch.cat([own, self._beside(own, self.pooled, rows)])
        return given

    def _put_residuals(self, given: dict[str, Any], rows: Rows) -> None:
        """Put a ControlNet's residuals of the added rows in the place of copies of the pipeline's."""
        if self._residuals is None:
            return

        def put(both: Tensor, added: Tensor) -> Tensor:
            # In guess mode the ControlNet saw no unconditional rows.
            missing = rows.added - len(added)
            return torch.cat([both[: rows.own], torch.zeros_like(added[:missing]), added])

        down, middle = self._residuals
        given["down_block_additional_residuals"] = [
            put(both, added) for both, added in zip(given["down_block_additional_residuals"], down, strict=True)
        ]
        given["mid_block_additional_residual"] = put(given["mid_block_additional_residual"], middle)
        self._residuals = None

    def _integration(self, rows: Rows, t: int, latent: tuple[int, int]) -> Integration:
        base = self.loaded.base_changes(self.latents) if self.dual.auxiliary_weights == BASE else None
        return Integration(self._attends(rows, t, latent), base, rows.added)

    def _attends(self, rows: Rows, t: int, latent: tuple[int, int]) -> Attend | list[Attend]:
        if self._masks is None:
            self._masks = TokenMasks.of(self.prompts, self.latents.device, self.loaded.mask_width(self.pipe.unet))
            if self.own_gain:
                self.dual = dataclasses.replace(self.dual, gain=calibrated_gain(self.loaded.unet.cross_layers(), latent))
        masks = self._masks
        integrate = integrating_attend(masks, self.dual, rows.concept, rows.auxiliary)
        if self.dual.layers is None and self.maps is None:
            return integrate
        chosen = integrated_layers(self.loaded.unet, self.dual.layers, latent)
        if self.maps is None:
            return [integrate if on else attend for on in chosen]
        layers = enumerate(self.loaded.unet.cross_layers())
        watching = [observer(self.maps, t, number, layer, masks, latent) for number, layer in layers]
        return [
            integrating_attend(masks, self.dual, rows.concept, rows.auxiliary, observe) if on else attend
            for on, observe in zip(chosen, watching, strict=True)
        ]

    def _step(self, output: Tensor, timestep: Tensor, rows: Rows) -> None:
        """Guide the auxiliary branch's output as the pipeline guides its own, and take its scheduler's step."""
        out = auxiliary = output[rows.auxiliary]
        if rows.own > rows.images:
            first = 0 if rows.added == rows.images else rows.own
            out = guide(output[first : first + rows.images], auxiliary, self.pipe.guidance_scale)
            # Some pipelines keep it to themselves.
            rescale = getattr(self.pipe, "guidance_rescale", self.arguments.get("guidance_rescale", 0.0))
            if rescale > 0:
                from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

                out = rescale_noise_cfg(out, auxiliary, guidance_rescale=rescale)
        options = dict(self.step_options)
        if "generator" in options:
            options["generator"] = self.generator
        self.latents = self.scheduler.step(out, timestep, self.latents, **options, return_dict=False)[0]
        self._moved = True


def _widened(value: Any, rows: Rows) -> Any:
    """Repeat the last rows of every tensor that has the pipeline's rows, within lists and dictionaries too."""
    if isinstance(value, Tensor) and value.dim() and len(value) == rows.own:
        return torch.cat([value, value[-rows.added :]])
    if isinstance(value, (list, tuple)):
        return [_widened(entry, rows) for entry in value]
    if isinstance(value, dict):
        return {name: _widened(entry, rows) for name, entry in value.items()}
    return value
