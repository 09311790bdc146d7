"""Options of sampling and of DCI: the model's own, or the user's in place of them."""

import dataclasses
from collections.abc import Collection
from typing import Any

from dci.dual_branch.integration import BASE, FINETUNED, DualBranch, calibrated_gain
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.option_types import checked, names_of, refuse_unknown
from ldm.solvers import SOLVERS
from ldm.text_to_image import SamplingOptions, check_options, solver_name


def sampling_options(model: LatentDiffusion, **given: Any) -> SamplingOptions:
    """Return the model's sampling options; those given and not None come first.

    Raises:
        UserError: a value that the model cannot be sampled with.
    """
    defaults = _defaults(model, SamplingOptions)
    size = model.config.image_size
    given = checked(SamplingOptions, _said(given))
    if "solver" in given and solver_name(given["solver"]) != "ddim":
        defaults["eta"] = 0.0  # the model's default belongs to DDIM; an eta that was asked for is refused
    options = SamplingOptions(**{"height": size, "width": size, **defaults, **given})
    solver = solver_name(options.solver)
    options = dataclasses.replace(options, solver=solver, spacing=options.spacing or SOLVERS[solver].usual_spacing)
    check_options(model, options)
    return options


def dual_branch(model: LatentDiffusion, height: int | None = None, width: int | None = None, **given: Any) -> DualBranch:
    """Return the model's DCI settings; those given and not None come first.

    Args:
        height, width: pixels of the image, which the gain follows; None: the model's own.
        given: fields of `DualBranch`; layers also as one name or as names with commas between them.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    given = _said(given)
    refuse_unknown(given, _DUAL)
    settings = {**_defaults(model, DualBranch), **given}
    size = model.config.image_size
    if "gain" not in given:
        settings["gain"] = _own_gain(model, model.latent_shape(height or size, width or size)[1:])
    return checked_dual_branch(settings)


def checked_dual_branch(settings: dict[str, Any]) -> DualBranch:
    """Return DCI's settings; unset ones get the authors' defaults.

    Raises:
        UserError: an unknown setting, or a value out of range.
    """
    settings = _said(settings)
    refuse_unknown(settings, _DUAL)
    layers = settings.get("layers")
    if layers is not None:
        names = str(layers).split(",") if isinstance(layers, (str, int)) else layers
        if not isinstance(names, Collection) or not all(isinstance(name, (str, int)) for name in names):
            raise UserError(f"layers {layers!r}: expected names, such as 16 or ('input', 'middle')")
        settings["layers"] = tuple(str(name).strip() for name in names)
    dual = DualBranch(**checked(DualBranch, settings))
    if not 0 <= dual.agg_time <= 1:
        raise UserError(f"agg_time {dual.agg_time}: expected 0 (plain sampling) to 1 (both branches to the end)")
    for name in ("gain", "token_sharpness", "pixel_sharpness"):
        if getattr(dual, name) < 0:
            raise UserError(f"{name} {getattr(dual, name)}: expected 0 or more")
    if dual.auxiliary_weights not in (FINETUNED, BASE):
        raise UserError(f"auxiliary_weights '{dual.auxiliary_weights}': expected {FINETUNED} or {BASE}")
    return dual


_DUAL = names_of(DualBranch)
DUAL_BRANCH = frozenset(_DUAL)
"""Names of DCI's settings."""


def _own_gain(model: LatentDiffusion, latent: tuple[int, int]) -> float:
    """The authors' gain for the finest layer of the size that is sampled, or the model's, which is for its own size."""
    layers, cells = model.unet.cross_layers(), model.config.image_size // model.config.autoencoder.downsampling
    gain = calibrated_gain(layers, latent)
    own = model.config.sampling.get("gain")
    if own is None:
        return gain
    return checked(DualBranch, {"gain": own})["gain"] * gain / calibrated_gain(layers, (cells, cells))


def _defaults(model: LatentDiffusion, schema: type) -> dict[str, Any]:
    """The entries of the model configuration's `sampling` section that belong to `schema`."""
    section = model.config.sampling
    known = names_of(SamplingOptions, DualBranch)
    unknown = sorted(set(section) - known)
    if unknown:
        raise UserError(
            f"unknown key 'sampling.{unknown[0]}' in the model configuration: known are {', '.join(sorted(known))}"
        )
    return {key: value for key, value in section.items() if key in names_of(schema)}


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}
