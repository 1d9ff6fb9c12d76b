"""Tiny pipelines in diffusers' published layout, with random weights: in a folder, and as diffusers' own object.

Only widths, depths and the picture tower's side are small: 16 latent channels, patches, templates, shards with an
index, hidden state -3 and grouped key heads are the published ones.
"""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests import published_text as text

CONDITIONS = {"concat": "latent_concat", "replace": "token_replace", "text": None}
CLASSES = {"concat": "HunyuanVideoImageToVideoPipeline", "replace": "HunyuanVideoImageToVideoPipeline"}
CLASSES |= {"text": "HunyuanVideoPipeline", "flux": "FluxPipeline"}
SHARD = "60KB"


def write(folder, variant, *, layers=(1, 2), heads=2, channels=(8, 8, 16, 16)):
    """Writes the folder of a variant (concat, replace, text or flux); returns the pipeline that it holds."""
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_layers": layers[0], "num_single_layers": layers[1]}
    sizes |= {"num_attention_heads": heads, "attention_head_dim": 16}
    parts = _flux(folder, sizes, channels) if variant == "flux" else _hunyuan(folder, variant, sizes, channels)
    index = {"_class_name": CLASSES[variant], "_diffusers_version": "0.33.0"}
    for name, part in parts.items():
        if "tokenizer" in name:
            continue
        if hasattr(part, "parameters"):
            part.save_pretrained(folder / name, max_shard_size=SHARD)
        else:
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return _pipeline(variant, parts)


def _pipeline(variant, parts):
    import diffusers

    pipeline = getattr(diffusers, CLASSES[variant])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _hunyuan(folder, variant, sizes, channels):
    import diffusers
    import torch
    import transformers

    vocabulary, merges = text.tokenizer_folder(folder)
    condition, latents = CONDITIONS[variant], 16
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=2 * latents + 1 if variant == "concat" else latents,
        out_channels=latents,
        num_refiner_layers=2,
        guidance_embeds=variant != "concat",
        text_embed_dim=32,
        pooled_projection_dim=24,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
        **sizes,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=latents, block_out_channels=channels, layers_per_block=1, norm_num_groups=4
    )
    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**text.llava_sizes()))
    language = text.randomise(torch, llava, 1)
    parts = {
        "transformer": _with_vectors(transformer),
        "vae": text.randomise(torch, vae, 3),
        "text_encoder": language if condition else language.model.language_model,
        "text_encoder_2": _clip(4),
        "tokenizer": transformers.PreTrainedTokenizerFast(
            tokenizer_object=text.llama_tokenizer(), pad_token="<pad>", padding_side="right"
        ),
        "tokenizer_2": transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    if condition:
        size = {"height": 336, "width": 336}
        parts["image_processor"] = transformers.CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size=size, resample=3
        )
    return parts


def _with_vectors(transformer):
    """Random biases and scales. Matrices stay as made: larger ones would amplify what float32 rounds."""
    import torch

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise)
    return transformer.eval()


def _clip(seed):
    import torch
    import transformers

    return text.randomise(
        torch, transformers.CLIPTextModel(transformers.CLIPTextConfig(**text.clip_text_sizes())), seed
    )


def _flux(folder, sizes, channels):
    import diffusers
    import torch
    import transformers

    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True)
    vocabulary, merges = text.clip_files(folder / "tokenizer")
    tokenizer = t5_tokenizer()
    tokenizer.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=tokenizer.get_vocab_size(),
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **sizes,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return {
        "transformer": _with_vectors(transformer),
        "vae": text.randomise(torch, vae, 3),
        "text_encoder": _clip(4),
        "text_encoder_2": text.randomise(torch, t5, 5),
        "tokenizer": transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77),
        "tokenizer_2": transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="right"
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def t5_tokenizer():
    """Pieces of words, the likeliest split, a mark where a word begins, and an end token."""
    letters = ["▁", *sorted(set("".join(text.PROMPTS)) - {" "})]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -2.0), ("▁red", -2.0), ("oat", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces + [(letter, -5.0) for letter in letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer
