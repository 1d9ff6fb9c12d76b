"""Parity with transformers' BERT on tiny random weights, the exact round trip, and the shipped folder."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.convert import bert
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.text import Bert, BertConfig, MiniLMTextEncoder
from magic141_jax.pytree import flatten

CONFIG = BertConfig(vocabulary=40, positions=12, width=24, layers=3, heads=2, mlp=48, length=8)
THEIRS = {theirs: getattr(CONFIG, ours) for theirs, ours in bert.CONFIG_FIELDS.items()} | bert.SUPPORTED
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "shark", "left"]


def random_tensors():
    """Published names with random values, from our own shapes."""
    params = Network.create(Bert, CONFIG).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.3, params)
    return from_ours(params, bert.TABLE), params


def test_parity_with_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    published = transformers.BertConfig(**THEIRS, attn_implementation="eager")
    model = transformers.BertModel(published).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "LayerNorm.weight" in name else 0.0
            parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
    ids = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (3, 8))
    mask = np.arange(8)[None] < np.array([[8], [5], [2]])
    with torch.no_grad():
        wanted = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()

    network = Network.create(Bert, CONFIG)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = to_ours(tensors, bert.TABLE, network.abstract_params)
    states, pooled = map(np.asarray, jax.jit(network.__call__)(params, ids, mask))
    assert np.abs(states - wanted)[mask].max() / np.abs(wanted[mask]).max() < 1e-5
    means = np.stack([row[keep].mean(0) for row, keep in zip(wanted, mask)])
    assert np.abs(pooled - means).max() / np.abs(means).max() < 1e-5


def test_round_trip_is_exact_and_drops_only_what_is_listed():
    tensors, params = random_tensors()
    unused = {
        "pooler.dense.weight": np.ones((24, 24)),
        "pooler.dense.bias": np.ones(24),
        "embeddings.position_ids": np.arange(12)[None],
    }
    back = to_ours(tensors | unused, bert.TABLE, Network.create(Bert, CONFIG).abstract_params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf)
    with pytest.raises(UserError, match=r"no rule for tensor cls\.bias"):
        to_ours(tensors | {"cls.bias": np.ones(3)}, bert.TABLE, params)


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}])
def test_another_kind_of_bert_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        bert.config_to_ours(THEIRS | change)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(UserError, match="lacks vocab_size"):
        bert.config_to_ours({k: v for k, v in THEIRS.items() if k != "vocab_size"})


def test_export_makes_a_folder_that_encodes_like_the_source(tmp_path):
    tensors, params = random_tensors()
    source, shipped = tmp_path / "source", tmp_path / "shipped"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(THEIRS))
    save_file(tensors, source / "model.safetensors")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer_json(), indent=2))
    bert.export_minilm(source, shipped, length=6)

    assert json.loads((shipped / "config.json").read_text())["model"] == "bert"
    assert "Apache" in (shipped / "NOTICE").read_text()
    assert sorted(p.name for p in shipped.iterdir()) == ["NOTICE", "config.json", "model.safetensors", "tokenizer.json"]
    assert (shipped / "model.safetensors").stat().st_size < 0.5 * (source / "model.safetensors").stat().st_size
    encoder = MiniLMTextEncoder.from_folder(shipped)
    ids, mask = encoder.tokenize(["left shark"])
    assert ids.tolist() == [[2, 5, 4, 3, 0, 0]]
    wanted = np.asarray(jax.jit(Network.create(Bert, CONFIG).__call__)(params, ids, mask)[0])
    got = np.asarray(encoder.encode(["left shark"]).states)
    assert 0 < np.abs(got - wanted).max() < 0.1
    assert (got * wanted).sum() / np.linalg.norm(got) / np.linalg.norm(wanted) > 0.999


def tokenizer_json():
    """A word-level tokenizer with the padding and truncation settings of the published file."""
    special = [{"id": i, "content": w, "special": True} for i, w in enumerate(WORDS[:4])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": {"max_length": 128, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 128},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [token | flags for token in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "[UNK]"},
    }
