"""Stable Diffusion's published models, for weights that come without a configuration; equal to configs/model/sd-*.yaml."""

from ldm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig


def sampling() -> dict:
    """The samplers' defaults for models with 4096 pixels in the finest layer."""
    return {"steps": 200, "scale": 6.0, "eta": 1.0, "gain": 500.0}


def sd_v1() -> ModelConfig:
    """Stable Diffusion 1.x."""
    return ModelConfig(name="sd-v1", sampling=sampling())


def sd_v2(parameterization: str = "eps") -> ModelConfig:
    """Stable Diffusion 2.x; eps at 512 px, v at 768 px."""
    v = parameterization == "v"
    return ModelConfig(
        name="sd-v2-v" if v else "sd-v2",
        image_size=768 if v else 512,
        unet=UNetConfig(context_dim=1024, num_head_channels=64, use_linear_in_transformer=True),
        text_encoder=openclip_vit_h(),
        schedule=ScheduleConfig(parameterization=parameterization),
        sampling=sampling(),
    )


def openclip_vit_h(layers: int = 23) -> TextEncoderConfig:
    """OpenCLIP ViT-H/14's text transformer; SD 2.x needs 23 of its 24 layers."""
    return TextEncoderConfig(kind="openclip", width=1024, layers=layers, heads=16, mlp_width=4096, hidden_act="gelu")
