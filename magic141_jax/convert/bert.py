"""BERT text encoders in the published layout (transformers, sentence-transformers) to ours, and the bundled copy.

`TABLE` is the whole knowledge: linear kernels are transposed and stacked over layers. What is never used here (the
pooler, which only the pretraining task reads, and the position numbers) is listed as dropped, so any other name is
an error. `export_minilm` makes the text_encoder folder that the embedded default ships: int8 weights, the tokenizer
without its line breaks, and a notice of where they come from. From the command line:

    python -c "from magic141_jax.convert.bert import export_minilm; export_minilm('all-MiniLM-L6-v2', 'text_encoder')"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magic141_jax import settings, weights
from magic141_jax.convert.engine import Rule, Table, linear, norm, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.text import Bert, BertConfig, read_tokenizer
from magic141_jax.pytree import Params

# their config key -> our field where the value is the same
CONFIG_FIELDS = {
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "type_vocab_size": "token_types",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp",
    "layer_norm_eps": "epsilon",
}
# what `Bert` computes; a model with another value is refused
SUPPORTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}

NOTICE = (
    "model.safetensors and tokenizer.json: sentence-transformers/all-MiniLM-L6-v2 (Apache License 2.0), fine-tuned "
    "from nreimers/MiniLM-L6-H384-uncased (MIT License), which is every second layer of "
    "microsoft/MiniLM-L12-H384-uncased (MIT License, Copyright (c) Microsoft Corporation). "
    "Changed: parameters renamed, linear kernels transposed and stacked, unused pooler removed, weights rounded to "
    "int8; tokenizer.json rewritten without white space, its padding and truncation settings removed.\n"
)


TABLE: Table = (
    Rule("embeddings.word_embeddings.weight", "word.embedding"),
    Rule("embeddings.position_embeddings.weight", "position.embedding"),
    Rule("embeddings.token_type_embeddings.weight", "token_type.embedding"),
    *norm("embeddings.LayerNorm", "norm"),
    *linear("encoder.layer.{i}.attention.self.query", "encoder.layers.q"),
    *linear("encoder.layer.{i}.attention.self.key", "encoder.layers.k"),
    *linear("encoder.layer.{i}.attention.self.value", "encoder.layers.v"),
    *linear("encoder.layer.{i}.attention.output.dense", "encoder.layers.out"),
    *norm("encoder.layer.{i}.attention.output.LayerNorm", "encoder.layers.attention_norm"),
    *linear("encoder.layer.{i}.intermediate.dense", "encoder.layers.mlp_in"),
    *linear("encoder.layer.{i}.output.dense", "encoder.layers.mlp_out"),
    *norm("encoder.layer.{i}.output.LayerNorm", "encoder.layers.mlp_norm"),
    Rule("embeddings.position_ids", ()),
    Rule("pooler.dense.weight", ()),
    Rule("pooler.dense.bias", ()),
)


def config_to_ours(theirs: Mapping[str, Any], *, length: int = 24) -> BertConfig:
    """Their config.json as a `BertConfig` for prompts of `length` tokens.

    Raises:
      UserError: a needed key is missing, or the model computes something else than `Bert`.
    """
    fields = config_fields(theirs, CONFIG_FIELDS, SUPPORTED, what="BERT")
    return settings.build(BertConfig, {**fields, "length": length}, where="bert")


def config_fields(
    theirs: Mapping[str, Any],
    names: Mapping[str, str],
    supported: Mapping[str, Any],
    *,
    what: str,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a transformers config.json under our field names.

    Args:
      theirs: the file's content.
      names: their keys -> our fields.
      supported: what the network computes: these keys have these values, or are absent.
      what: the kind of model, for messages.
      defaults: values of keys that may be absent, since transformers does not write those that equal its defaults.

    Raises:
      UserError: a needed key is missing, or the model computes something else.
    """
    if not isinstance(theirs, Mapping):
        raise UserError(f"the config of this {what} is {theirs!r}, no JSON object")
    for key, value in supported.items():
        if theirs.get(key, value) != value:
            raise UserError(f"this {what} has {key} = {theirs[key]!r}; only {value!r} is supported")
    known = {**(defaults or {}), **theirs}
    missing = [key for key in names if key not in known]
    if missing:
        raise UserError(f"the config.json of this {what} lacks {', '.join(missing)}")
    return {ours: known[key] for key, ours in names.items()}


def load_published(folder: Path, *, length: int = 24) -> tuple[BertConfig, Params]:
    """Reads config.json and model.safetensors of a published BERT folder: our config and float parameters.

    Raises:
      UserError: a file is missing or damaged, or its tensors don't fit `TABLE`.
    """
    folder = Path(folder)
    config = config_to_ours(weights.read_json(folder / "config.json"), length=length)
    params = to_ours(weights.read_tensors(folder), TABLE, Network.create(Bert, config).abstract_params)
    return config, params


def export_minilm(src_folder: Path, dst_folder: Path, *, length: int = 24, storage: weights.Storage = "int8") -> None:
    """Writes the shipped text_encoder folder from a published all-MiniLM-L6-v2 folder.

    The folder holds config.json ("model": "bert"), model.safetensors, tokenizer.json and NOTICE.

    Raises:
      UserError: a file of the source is missing, damaged or of another architecture.
    """
    src_folder, dst_folder = Path(src_folder), Path(dst_folder)
    config, params = load_published(src_folder, length=length)
    tokenizer = read_tokenizer(src_folder / "tokenizer.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    weights.save(dst_folder, {"model": "bert", **settings.to_dict(config)}, params, storage=storage)
    _write(dst_folder / "tokenizer.json", _minified(tokenizer.to_str()))
    _write(dst_folder / "NOTICE", NOTICE)


def _minified(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(file)
