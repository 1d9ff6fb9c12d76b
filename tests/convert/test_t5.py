"""Parity with transformers' T5 encoder on tiny random weights, with and without a mask; both names of the words."""

import jax
import numpy as np
import pytest

from magic141_jax.convert import t5
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.t5 import T5, T5Config
from magic141_jax.pytree import count

SIZES = {"vocab_size": 40, "d_model": 24, "d_kv": 16, "d_ff": 56, "num_layers": 3, "num_heads": 2}
THEIRS = SIZES | {"feed_forward_proj": "gated-gelu", "model_type": "t5"}
WORDS = "shared.weight", "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def published():
    """A tiny published encoder with every parameter random; its projections large enough for sharp attention."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = transformers.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "bias" in name or "shared" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(0.3 * torch.randn_like(parameter) + 1 if parameter.ndim == 1 else 0)
            parameter.add_(scale * torch.randn_like(parameter) if parameter.ndim == 2 else 0)
    return model


@pytest.fixture(scope="module")
def tensors(published):
    return {name: tensor.numpy() for name, tensor in published.state_dict().items()}


def converted(tensors, **run_time):
    network = Network.create(T5, t5.config_to_ours(THEIRS, **run_time))
    return network, to_ours(tensors, t5.table(network.config), network.abstract_params)


@pytest.mark.parametrize(("length", "masked"), [(9, True), (9, False), (300, False)])
def test_parity(published, tensors, length, masked):
    """300 tokens reach the last bucket, whose distances are cut at 128."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    ids = random.integers(0, 40, (3, length))
    mask = np.arange(length)[None] < np.array([[length], [5], [1]])
    with torch.no_grad():
        wanted = published(torch.tensor(ids), attention_mask=torch.tensor(mask) if masked else None)[0].numpy()
    network, params = converted(tensors)
    states = np.asarray(jax.jit(network.__call__)(params, ids, mask if masked else None))
    rows = mask if masked else np.ones_like(mask)
    assert wanted.std() > 0.1
    assert np.abs(states - wanted)[rows].max() / np.abs(wanted[rows]).max() < 1e-5


def test_bfloat16_is_close(tensors):
    network, params = converted(tensors)
    ids = np.random.default_rng(0).integers(0, 40, (2, 9))
    wanted = network(params, ids)
    half, _ = converted(tensors, compute_dtype="bfloat16")
    states = half(params, ids)
    assert states.dtype == jax.numpy.bfloat16
    assert np.abs(np.asarray(states, np.float32) - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_round_trip_is_exact_and_either_name_of_the_words_will_do(tensors):
    words = tensors[WORDS[0]]
    layers = {name: tensor for name, tensor in tensors.items() if name not in WORDS}
    for names in (WORDS, WORDS[:1], WORDS[1:]):
        network, params = converted(layers | dict.fromkeys(names, words))
        back = from_ours(params, t5.table(network.config))
        assert back.keys() == layers.keys() | {WORDS[0]}
        assert all(np.array_equal(back[name], tensors[name]) for name in back), names
    with pytest.raises(UserError, match=r"missing word\.embedding"):
        converted(layers)
    with pytest.raises(UserError, match=r"no rule for tensor decoder\.final_layer_norm\.weight"):
        converted(tensors | {"decoder.final_layer_norm.weight": words})


def test_published_sizes():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = t5.config_from_ours(T5Config())
    with torch.device("meta"):
        model = transformers.T5EncoderModel(transformers.T5Config(**theirs))
    assert t5.config_to_ours(model.config.to_dict()) == T5Config()
    assert count(Network.create(T5, T5Config()).abstract_params) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
        ({"model_type": "umt5"}, "model_type = 'umt5'"),
        ({"relative_attention_max_distance": 8}, "distance"),
        ({"d_kv": None}, "head_width"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        t5.config_to_ours(THEIRS | change)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(UserError, match="lacks d_model, feed_forward_proj"):
        t5.config_to_ours({k: v for k, v in THEIRS.items() if k not in ("d_model", "feed_forward_proj")})
