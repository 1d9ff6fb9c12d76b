"""Prompts to T5 states and pooled vectors: the published ids, padding that counts, truncation that is told."""

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from magic141_jax.errors import UserError
from magic141_jax.models.flux_text import MAX_BATCH, FluxTextEncoder
from magic141_jax.models.network import Network
from magic141_jax.models.t5 import T5, T5Config

PROMPTS = ["a small red boat on a quiet lake", "a cat", ""]
CONFIG = T5Config(vocabulary=64, width=12, head_width=4, heads=2, mlp=16, layers=2)


def tiny_tokenizer(pad="<pad>"):
    """T5's kind: pieces of words, the likeliest split, a mark where a word begins, and an end token."""
    words = ["▁a", "▁small", "▁red", "▁boat", "▁on", "▁quiet", "▁la", "ke", "▁c", "at"]
    letters = ["▁", *sorted(set("".join(PROMPTS)) - {" "})]
    pieces = [(pad, 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0) for word in words] + [(letter, -5.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def pool(prompts):
    return np.array([[len(p), p.count("a"), 1.0] for p in prompts])


@pytest.fixture(scope="module")
def network():
    return Network.create(T5, CONFIG)


@pytest.fixture(scope="module")
def params(network):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), network.abstract_params)


def build(network, params, tokenizer=None, length=16, **changes):
    options = {"pool": pool, "pooled_width": 3, "length": length} | changes
    return FluxTextEncoder(network, params, tokenizer or tiny_tokenizer(), **options)


@pytest.fixture(scope="module")
def encoder(network, params):
    return build(network, params)


def test_states_are_those_of_all_tokens_padding_included(encoder, network, params):
    states, mask, pooled = encoder.encode(PROMPTS)
    assert states.shape == (3, encoder.length, encoder.width) == (3, 16, 12) and states.dtype == np.float32
    assert mask.dtype == bool and mask.all()
    np.testing.assert_array_equal(pooled, pool(PROMPTS))
    ids = encoder.tokenize(PROMPTS)
    np.testing.assert_allclose(states, network(params, ids), rtol=1e-5, atol=1e-5)
    assert ids[2].tolist() == [1] + [0] * 15 and np.abs(states[2, 1:]).max() > 0.1


@pytest.mark.parametrize("length", [16, 4])
@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_ids_are_those_of_the_published_pipeline(network, params, length):
    transformers = pytest.importorskip("transformers")
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), **names)
    wanted = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True).input_ids
    assert build(network, params, length=length).tokenize(PROMPTS).tolist() == wanted


def test_truncation_is_told_with_what_was_dropped(network, params):
    short = build(network, params, length=4)
    kept = short.tokenizer.encode(PROMPTS[0]).offsets[2][1]
    with pytest.warns(UserWarning, match=f"longer than 4 tokens.*{PROMPTS[0][kept:].strip()!r}") as told:
        out = short.encode(PROMPTS[:1])
    assert out.states.shape == (1, 4, 12) and told[0].filename == __file__


def test_a_prompt_that_fits_does_not_warn(encoder, recwarn):
    encoder.encode(["a cat"])
    assert not [w for w in recwarn if "dropped" in str(w.message)]


def test_batch_composition_does_not_matter(encoder):
    prompts = PROMPTS * 4
    assert len(prompts) > MAX_BATCH
    together = encoder.encode(prompts)
    for i in (0, MAX_BATCH, len(prompts) - 1):
        alone = encoder.encode([prompts[i]])
        np.testing.assert_allclose(together.states[i], alone.states[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(together.pooled[i], alone.pooled[0])


@pytest.mark.parametrize("prompts", ["a cat", []])
def test_a_bare_string_or_nothing_is_refused(encoder, prompts):
    with pytest.raises(UserError, match="list of prompts"):
        encoder.encode(prompts)


def test_parts_that_do_not_fit_are_refused(network, params):
    big = tiny_tokenizer()
    big.add_tokens([f"word{i}" for i in range(64)])
    for tokenizer in (big, tiny_tokenizer(pad="[PAD]")):
        with pytest.raises(UserError, match="same model"):
            build(network, params, tokenizer)
    with pytest.raises(UserError, match="T5 text encoder does not fit"):
        build(network, {k: v for k, v in params.items() if k != "distance"})
    with pytest.raises(UserError, match="at least 2"):
        build(network, params, length=1)
    with pytest.raises(ValueError, match=r"not \(3, 5\)"):
        build(network, params, pooled_width=5).encode(PROMPTS)
