"""Generation: text to image, image to video, text to video, and videos of any length by a sliding window."""

from magic141_jax.pipelines.components import load_components
from magic141_jax.pipelines.image_to_video import ImageToVideoPipeline
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.options import PipelineOutput, SamplingOptions
from magic141_jax.pipelines.text_to_image import TextToImagePipeline
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

__all__ = [
    "ImageToVideoPipeline",
    "PipelineOutput",
    "SamplingOptions",
    "TextToImagePipeline",
    "TextToVideoPipeline",
    "load_components",
    "stream_video",
]
