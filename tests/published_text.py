"""Tiny text encoders in the published layout: tokenizers that place the templates as the real ones do, random networks.

Only widths and depths are small: the split expressions, the special tokens, the image token's place, 576 patches,
grouped key heads and quick_gelu are the published ones. Every vector is random, so that a dropped bias shows.
"""

import json

import jax
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from magic141_jax.models import clip_inputs, hunyuan_text

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN = "<|begin_of_text|>"
SPECIALS = [BEGIN, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<unk>", "<image>"]
SPECIALS += ["<pad>"]
PROMPTS = ["a small red boat drifts across a quiet lake", "zebras, 2 of them!", "the camera pans left and right slowly"]
CORPUS = [t.head + t.tail for t in (hunyuan_text.TEXT_TEMPLATE, hunyuan_text.IMAGE_TEMPLATE)] + PROMPTS
# what the published LLaVA says of its two networks: only what differs from transformers' defaults
PUBLISHED_LLAMA = {
    "model_type": "llama",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128320,
}
PUBLISHED_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
VOCABULARY = 768
CLIP_VOCABULARY = 1024


def llama_tokenizer():
    """A byte-level BPE of Llama 3's kind, trained until every word of the templates is one token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIALS),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def clip_files(folder):
    """Writes vocab.json and merges.txt: letters, letters that end a word, merges, the two marks last."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=1, show_progress=False, end_of_word_suffix="</w>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([text.lower() for text in CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *model["vocab"], clip_inputs.START, clip_inputs.END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return vocabulary, [tuple(pair.split(" ")) for pair in merges]


def tokenizer_folder(folder):
    """Writes tokenizer/ and tokenizer_2/; returns what CLIP's was written from."""
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True)
    llama_tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    return clip_files(folder / "tokenizer_2")


def llama_sizes(layers=5):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    }


def clip_text_sizes(layers=3):
    return {
        "vocab_size": CLIP_VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def clip_vision_sizes(layers=3, image=336):
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": image,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    }


def videomae_sizes():
    return {
        "model_type": "videomae",
        "image_size": 16,
        "num_frames": 4,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }


def llava_sizes(image=336):
    tokenizer = llama_tokenizer()
    return {
        "text_config": {"model_type": "llama", **llama_sizes()},
        "vision_config": {"model_type": "clip_vision_model", **clip_vision_sizes(image=image)},
        "image_token_index": tokenizer.token_to_id("<image>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
    }


def randomise(torch, module, seed=0):
    """Draws every parameter: matrices that keep the scale of what passes, vectors around their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise if "embed" in name else noise * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return module.eval()


def draw(network, seed=0):
    """Random parameters without any initial zero, drawn without compiling anything."""
    generator = np.random.default_rng(seed)

    def values(leaf):
        return generator.normal(0, leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.5, leaf.shape)

    return jax.tree.map(lambda leaf: values(leaf).astype(np.float32), network.abstract_params)


def tensors(module):
    """The module's state as numpy arrays."""
    return {name: tensor.detach().float().numpy() for name, tensor in module.state_dict().items()}


def relative(have, want):
    """The largest error over the root mean square of what is wanted."""
    return float(abs(have - want).max() / (want**2).mean() ** 0.5)
