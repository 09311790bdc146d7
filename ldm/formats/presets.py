"""Stable Diffusion's published models, for weights that come without a configuration; equal to configs/model/sd-*.yaml."""

from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig


def sampling() -> dict:
    """The samplers' defaults for models with 4096 pixels in the finest layer."""
    return {"steps": 200, "scale": 6.0, "eta": 1.0}


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


def sdxl() -> ModelConfig:
    """Stable Diffusion XL 1.0, base."""
    return ModelConfig(
        name="sdxl",
        image_size=1024,
        latent_scale=0.13025,
        unet=UNetConfig(
            attention_resolutions=[4, 2],
            channel_mult=[1, 2, 4],
            num_head_channels=64,
            transformer_depth=[0, 2, 10],
            use_linear_in_transformer=True,
            context_dim=2048,
            adm_in_channels=2816,
        ),
        autoencoder=AutoencoderConfig(force_upcast=True),
        text_encoder=TextEncoderConfig(clip_skip=2, final_norm=False),
        text_encoder_2=openclip_vit_big_g(),
        zeros_for_empty_negative=True,
        sampling=sampling(),
    )


def openclip_vit_big_g() -> TextEncoderConfig:
    """OpenCLIP ViT-bigG/14's text transformer; SDXL reads the layer before the last, and pools the last."""
    return TextEncoderConfig(
        kind="openclip",
        width=1280,
        layers=32,
        heads=20,
        mlp_width=5120,
        hidden_act="gelu",
        clip_skip=2,
        final_norm=False,
        projection=1280,
    )


def openclip_vit_h(layers: int = 23) -> TextEncoderConfig:
    """OpenCLIP ViT-H/14's text transformer; SD 2.x needs 23 of its 24 layers."""
    return TextEncoderConfig(kind="openclip", width=1024, layers=layers, heads=16, mlp_width=4096, hidden_act="gelu")
