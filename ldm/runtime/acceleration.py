"""What a device computes fastest with: precision, memory layout, packed weights, compiled graphs."""

import warnings

import torch

from ldm.config import ModelConfig
from ldm.diffusion import LatentDiffusion
from ldm.errors import UserError
from ldm.runtime.cpu_convolutions import to_mkldnn

WIDE = 128  # channels from which on half precision pays off at any batch size


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str) -> str:
    """Return the torch device of that name; auto is CUDA where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.zeros(1, device=name).is_meta:
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        raise UserError(_NO_DEVICE.format(name)) from error
    return name


_NO_DEVICE = "device {} cannot be used here: give cpu, or cuda on a machine with a GPU"


def check_device(name: str) -> None:
    """Raise UserError for a device that other processes could not use; of a GPU this one takes no memory."""
    if name == "auto":
        return
    try:
        kind, number = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError as error:
        raise UserError(_NO_DEVICE.format(name)) from error
    if kind == "cuda" and number >= torch.cuda.device_count():
        raise UserError(_NO_DEVICE.format(name))
    if kind != "cuda":
        pick_device(name)


def fastest_precision(config: ModelConfig, device: torch.device | str) -> torch.dtype:
    """Return the precision that a model is sampled in fastest on a device.

    bf16, which unlike fp16 cannot overflow, where the device multiplies it faster than fp32; fp16 on older
    GPUs; fp32 elsewhere, and for narrow networks such as the embedded model's, which gain little.
    """
    if config.unet.model_channels < WIDE:
        return torch.float32
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _native_on_cpu(torch.bfloat16) else torch.float32


def warn_of_emulation(dtype: torch.dtype, device: torch.device | str) -> None:
    """Warn of a half precision that the processor has no instructions for: it takes many times as long as fp32."""
    if is_emulated(dtype, device):
        name = next(name for name, known in PRECISIONS.items() if known == dtype)
        warnings.warn(f"this processor only emulates {name}, which takes many times as long as fp32", stacklevel=3)


def is_emulated(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Return whether a device is a CPU that is known to have no instructions for a precision."""
    return torch.device(device).type == "cpu" and _native_on_cpu(dtype) is False


def _native_on_cpu(dtype: torch.dtype) -> bool | None:
    """Whether the CPU has instructions for a precision; None where PyTorch or the processor does not say."""
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer releases of PyTorch have it
    if known.get("architecture") != "x86_64":
        return None
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(known.get(f"avx512_{name}") or known.get(f"amx_{name}"))


def accelerate(
    model: LatentDiffusion, device: torch.device | str, channels_last: bool = False, compiled: bool = False
) -> list[str]:
    """Prepare a model for fast sampling on a device that it will be moved to; it computes the same to rounding.

    Args:
        channels_last: ask for this memory layout; GPUs get it in half precision without asking.
        compiled: compile the UNet, with static shapes: a graph while both branches run and one afterwards, which
            a GPU replays without launching kernels one by one.

    Returns:
        What was done, in words.
    """
    warn_of_emulation(model.dtype, device)
    on_gpu, done = torch.device(device).type == "cuda", []
    if channels_last or (on_gpu and model.dtype != torch.float32):
        model.to(memory_format=torch.channels_last)
        done.append("channels last in memory")
    if compiled:
        model.static_shapes = True
        model.unet.compile(dynamic=False, mode="reduce-overhead" if on_gpu else None)
        done.append("compiled UNet, replayed as CUDA graphs" if on_gpu else "compiled UNet")
    elif torch.device(device).type == "cpu" and to_mkldnn(model.unet):
        done.append("convolutions' weights packed")
    return done
