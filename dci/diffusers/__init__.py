"""DCI for the pipelines of the library diffusers: two lines in code that samples with them already.

    from diffusers import StableDiffusionPipeline
    from dci.diffusers import DCIPipeline

    pipe = DCIPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(...))
    pipe.load_concept("concept.safetensors")
    images = pipe("a V* dog in times square", agg_time=0.3, generator=g).images

The pipeline's own loop runs as it is. Its UNet is called through a stand-in, which adds the auxiliary branch's
rows to the batch while both branches run and takes them off the output again; see `branch`.
"""

from dci.diffusers.pipeline import DCIPipeline

__all__ = ["DCIPipeline"]
