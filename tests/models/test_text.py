"""Text encoding: fixed shapes, padding and batch mates that don't matter, truncation that is told, words that count."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from magic141_jax import settings, sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.text import MAX_BATCH, SHARDING_RULES, Bert, BertConfig, MiniLMTextEncoder, TextStates

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "shark", "bee", "moves"]
WORDS += ["left", "right", "on", "yellow", "background"]
CONFIG = BertConfig(vocabulary=16, positions=32, width=16, layers=2, heads=2, mlp=32, length=10)
SHIPPED = Path(__file__).parents[2] / "weights" / "emoji64" / "text_encoder"


def tiny_tokenizer():
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@pytest.fixture(scope="module")
def params():
    return Network.create(Bert, CONFIG).init(jax.random.key(0))


@pytest.fixture()
def folder(tmp_path, params):
    weights.save(tmp_path / "text", {"model": "bert", **settings.to_dict(CONFIG)}, params)
    tiny_tokenizer().save(str(tmp_path / "text" / "tokenizer.json"))
    return tmp_path / "text"


@pytest.fixture(scope="module")
def encoder(params):
    return MiniLMTextEncoder(Network.create(Bert, CONFIG), params, tiny_tokenizer())


def close(a: TextStates, b: TextStates):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_shapes_dtypes_and_zero_padding(encoder):
    out = encoder.encode(["a shark moves left", "", "a bee"])
    assert out.states.shape == (3, encoder.length, encoder.width) and out.states.dtype == np.float32
    assert out.pooled.shape == (3, encoder.pooled_width) and out.pooled.dtype == np.float32
    assert out.mask.dtype == bool and out.mask.sum(1).tolist() == [6, 2, 4]
    assert not np.asarray(out.states)[~np.asarray(out.mask)].any()


def test_padding_content_does_not_matter(params):
    network = jax.jit(Network.create(Bert, CONFIG).__call__)
    mask = np.arange(8)[None] < np.array([[8], [5]])
    ids = np.random.default_rng(0).integers(0, 13, (2, 8))
    other = np.where(mask, ids, (ids + 5) % 13)
    for a, b in zip(network(params, ids, mask), network(params, other, mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_length_of_padding_does_not_matter(encoder, params):
    wide = MiniLMTextEncoder(Network.create(Bert, dataclasses.replace(CONFIG, length=16)), params, tiny_tokenizer())
    a, b = (e.encode(["a shark moves left"]) for e in (encoder, wide))
    close(a, TextStates(b.states[:, :10], b.mask[:, :10], b.pooled))
    assert not b.mask[:, 10:].any()


def test_a_mesh_does_not_change_the_states(folder):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    prompts = ["a shark moves left", "a bee", "yellow"]
    encoder = MiniLMTextEncoder.from_folder(folder, mesh=mesh)
    kernel = encoder.params["encoder"]["layers"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    out = encoder.encode(prompts)
    assert out.states.shape == (3, CONFIG.length, CONFIG.width)
    close(out, MiniLMTextEncoder.from_folder(folder).encode(prompts))


def test_batch_composition_does_not_matter(encoder):
    prompts = ["a shark moves left", "a bee moves right on yellow", "yellow"] * 30
    assert len(prompts) > MAX_BATCH
    together = encoder.encode(prompts)
    for i in (0, 1, MAX_BATCH - 1, MAX_BATCH, len(prompts) - 1):
        close(TextStates(*(x[i : i + 1] for x in together)), encoder.encode([prompts[i]]))


def test_pooled_is_the_masked_mean(encoder):
    states, mask, pooled = map(np.asarray, encoder.encode(["a shark moves left", "bee"]))
    for i in range(2):
        np.testing.assert_allclose(pooled[i], states[i][mask[i]].mean(0), rtol=1e-5, atol=1e-6)


def test_direction_word_changes_its_own_token_most(encoder):
    left, right = np.asarray(encoder.encode(["a shark moves left", "a shark moves right"]).states)
    change = np.linalg.norm(left - right, axis=-1)
    assert change.argmax() == 4  # [CLS] a shark moves LEFT
    assert change[4] > 0.3 * np.linalg.norm(left[4])


def test_word_order_matters(encoder):
    a, b = np.asarray(encoder.encode(["a shark moves left on a bee", "a bee moves left on a shark"]).pooled)
    assert np.abs(a - b).max() > 1e-3


def test_truncation_is_told_with_what_was_dropped(encoder):
    with pytest.warns(UserWarning, match=r"longer than 10 tokens.*'background left left'"):
        out = encoder.encode(["a shark moves left on a yellow bee background left left"])
    assert out.mask.all()


def test_a_prompt_that_just_fits_does_not_warn(encoder, recwarn):
    assert encoder.encode(["a shark moves left on a yellow bee"]).mask.all()
    assert not [w for w in recwarn if "dropped" in str(w.message)]


@pytest.mark.parametrize("prompts", ["a shark", []])
def test_a_bare_string_or_nothing_is_refused(encoder, prompts):
    with pytest.raises(UserError, match="list of prompts"):
        encoder.encode(prompts)


def test_folder_gives_the_same_states(folder, encoder):
    close(MiniLMTextEncoder.from_folder(folder).encode(["a bee"]), encoder.encode(["a bee"]))
    assert MiniLMTextEncoder.from_folder(folder, length=5).encode(["a bee"]).states.shape == (1, 5, 16)


def _cut(name):
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def _edit(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


DAMAGE = {
    "truncated tokenizer": (_cut("tokenizer.json"), "tokenizer.json.*damaged"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no file .*tokenizer.json"),
    "truncated weights": (_cut("model.safetensors"), "truncated or damaged"),
    "other sizes": (_edit(width=32), "does not fit its config"),
    "other model": (_edit(model="mmdit"), 'must be "bert"'),
    "unknown key": (_edit(widht=32), "Did you mean 'width'"),
    "length past the positions": (_edit(length=33), r"3\.\.32"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folder_is_a_user_error(folder, case):
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(UserError, match=message):
        MiniLMTextEncoder.from_folder(folder)


def test_tokenizer_of_another_model_is_refused(params):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    with pytest.raises(UserError, match="same model"):
        MiniLMTextEncoder(Network.create(Bert, CONFIG), params, tokenizer)


def test_every_parameter_has_a_sharding_rule_and_matrices_are_split():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = Network.create(Bert, CONFIG).abstract_params
    specs = {p.path: p.spec for p in sharding.placements(shapes, mesh, SHARDING_RULES)}
    for path, spec in specs.items():
        assert ("fsdp" in spec) == path.endswith(("kernel", "embedding")), path
    assert specs["encoder.layers.mlp_in.kernel"] == PartitionSpec(None, "fsdp", "tensor")


@pytest.mark.skipif(not SHIPPED.exists(), reason="the bundled weights are not in this checkout")
def test_shipped_encoder_keeps_direction_words():
    encoder = MiniLMTextEncoder.from_folder(SHIPPED)
    prompts = [f"a shark moves {word} on a yellow background" for word in ("left", "right")]
    states, mask, pooled = map(np.asarray, encoder.encode(prompts))

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    tokens = cosine(states[0][mask[0]], states[1][mask[1]])
    assert tokens.argmin() == 4 and tokens[4] < 0.75
    assert cosine(*pooled) > 0.95  # why the token states, not the pooled vector, condition the network
    np.testing.assert_allclose(np.sqrt((states[mask] ** 2).mean()), 0.44, atol=0.03)
