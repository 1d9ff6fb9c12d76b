"""Networks (Flax NNX), each with its config dataclass beside it."""

from magic141_jax.models import hunyuan_vae, image_encoder, mmdit, patch_vae
from magic141_jax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from magic141_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.patch_vae import PatchVAE, PatchVAEConfig
from magic141_jax.models.text import Bert, BertConfig

# The "model" of a component's config.json -> (its config dataclass, its module)
MODELS = {
    "mmdit": (MMDiTConfig, MMDiT),
    "hunyuan_vae": (HunyuanVAEConfig, HunyuanVAE),
    "patch_vae": (PatchVAEConfig, PatchVAE),
    "bert": (BertConfig, Bert),
    "image_encoder": (ImageEncoderConfig, ImageEncoder),
}

# The same name -> (regex on a parameter's dotted path, mesh axes) rules, see `magic141_jax.sharding`
SHARDING_RULES = {
    "mmdit": mmdit.SHARDING_RULES,
    "hunyuan_vae": hunyuan_vae.SHARDING_RULES,
    "patch_vae": patch_vae.SHARDING_RULES,
    "image_encoder": image_encoder.SHARDING_RULES,
}
