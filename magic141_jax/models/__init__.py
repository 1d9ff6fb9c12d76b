"""Networks (Flax NNX), each with its config dataclass beside it."""

from typing import Any

from magic141_jax.models import (
    clip,
    discriminator,
    hunyuan_vae,
    image_encoder,
    kl_vae,
    llama,
    llava,
    mmdit,
    patch_vae,
    t5,
)
from magic141_jax.models.clip import ClipText, ClipTextConfig
from magic141_jax.models.discriminator import FeatureHeads, FeatureHeadsConfig
from magic141_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from magic141_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from magic141_jax.models.kl_vae import KLVAE, KLVAEConfig
from magic141_jax.models.llama import Llama, LlamaConfig
from magic141_jax.models.llava import Llava, LlavaConfig
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.patch_vae import PatchVAE, PatchVAEConfig
from magic141_jax.models.t5 import T5, T5Config
from magic141_jax.models.text import Bert, BertConfig

# The "model" of a component's config.json -> (its config dataclass, its module)
MODELS = {
    "mmdit": (MMDiTConfig, MMDiT),
    "feature_heads": (FeatureHeadsConfig, FeatureHeads),
    "hunyuan_vae": (HunyuanVAEConfig, HunyuanVAE),
    "kl_vae": (KLVAEConfig, KLVAE),
    "patch_vae": (PatchVAEConfig, PatchVAE),
    "bert": (BertConfig, Bert),
    "t5": (T5Config, T5),
    "image_encoder": (ImageEncoderConfig, ImageEncoder),
    "clip_text": (ClipTextConfig, ClipText),
    "llama": (LlamaConfig, Llama),
    "llava": (LlavaConfig, Llava),
}


def kind_of(config: Any) -> str:
    """The name in `MODELS` of a config's network."""
    return next(name for name, (config_class, _) in MODELS.items() if type(config) is config_class)


# The same name -> (regex on a parameter's dotted path, mesh axes) rules, see `magic141_jax.sharding`
SHARDING_RULES = {
    "mmdit": mmdit.SHARDING_RULES,
    "feature_heads": discriminator.SHARDING_RULES,
    "hunyuan_vae": hunyuan_vae.SHARDING_RULES,
    "kl_vae": kl_vae.SHARDING_RULES,
    "patch_vae": patch_vae.SHARDING_RULES,
    "t5": t5.SHARDING_RULES,
    "image_encoder": image_encoder.SHARDING_RULES,
    "clip_text": clip.SHARDING_RULES,
    "llama": llama.SHARDING_RULES,
    "llava": llava.SHARDING_RULES,
}
