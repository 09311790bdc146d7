from setuptools import setup

setup(
    name="dci",
    version="0.1.0",
    description="Personalised image generation by ICO and DCI (ECCV 2024)",
    license="Apache-2.0",
    packages=["ldm", "ldm.formats", "ldm.pretraining", "dci"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "pytorch-lightning>=2.6",
        "omegaconf>=2.3",
        "pyyaml",
        "transformers>=4.48",
        "huggingface_hub",
        "tokenizers",
        "open_clip_torch>=2.24",
        "safetensors>=0.4",
        "einops>=0.7",
        "numpy>=1.26",
        "pillow>=11.1",
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={"test": ["pytest", "diffusers>=0.32", "scipy"]},
)
