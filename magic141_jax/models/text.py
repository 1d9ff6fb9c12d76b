"""Text encoders: prompts -> token states (b, s, e), a mask, and one pooled vector (b, p).

`TextEncoder` is what pipelines and the latent cache ask for. The embedded default fills it with all-MiniLM-L6-v2, a
six-layer BERT (arXiv 1810.04805, distilled as in arXiv 2002.10957): the network attends to its TOKEN states, because
the pooled vector nearly erases single words such as "left" and "right"; the pooled vector (masked mean over tokens)
only joins the timestep embedding (arXiv 2502.07701, figure 3).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Encoding, Tokenizer

from magic141_jax import settings, sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.models import encoder, stored
from magic141_jax.models.encoder import Encoder, EncoderConfig, affine_norm
from magic141_jax.models.network import Network, apart
from magic141_jax.models.resident import Held, Lend, Lent, Source, at_once, require_match, taken
from magic141_jax.pytree import Params
from magic141_jax.shapes import Pooled, TokenIds, TokenMask, Tokens

MAX_BATCH = 64

SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    *encoder.SHARDING_RULES,
    (r"(word|position|token_type)\.embedding", (None, "fsdp")),
    (r"norm\.(scale|bias)", ()),
)


class TextStates(NamedTuple):
    """What a text encoder returns, padded to its fixed length.

    states: (b, s, e) float32, zero where `mask` is False; mask: (b, s) bool; pooled: (b, p) float32.
    """

    states: Tokens
    mask: TokenMask
    pooled: Pooled


class TextEncoder(Protocol):
    """Prompts in, conditioning out. `width` is e and `pooled_width` is p of `TextStates`.

    s is `length`, and where the encoder reads a picture together with its prompt also the `image_tokens` rows of the
    picture in front; other encoders have `image_tokens` 0 and take no images.
    """

    length: int
    width: int
    pooled_width: int
    image_tokens: int

    def encode(self, prompts: Sequence[str], images: Sequence[np.ndarray] | None = None) -> TextStates:
        """Encodes each prompt, padded or truncated to `length` tokens; warns when a prompt is truncated.

        `images` are one picture (y, x, 3) in [0, 1] for each prompt, of any size, where `image_tokens` is not 0.
        """
        ...


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; `length` is the padded prompt length in tokens, special tokens included."""

    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    width: int = 384
    layers: int = 6
    heads: int = 12
    mlp: int = 1536
    epsilon: float = 1e-12
    length: int = 24
    pooling: Literal["mean"] = "mean"

    def __post_init__(self) -> None:
        if not 3 <= self.length <= self.positions:
            raise UserError(f"a text length of {self.length} tokens: it must lie in 3..{self.positions}")


class Bert(nnx.Module):
    """BERT: word + position + segment embeddings, then post-norm transformer layers. Segment is always 0."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        width = config.width
        self.word = nnx.Embed(config.vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(config.positions, width, rngs=rngs)
        self.token_type = nnx.Embed(config.token_types, width, rngs=rngs)
        self.norm = affine_norm(width, config.epsilon, rngs=rngs)
        layers = EncoderConfig(
            layers=config.layers,
            width=width,
            heads=config.heads,
            mlp=config.mlp,
            pre_norm=False,
            epsilon=config.epsilon,
        )
        self.encoder = Encoder(layers, rngs=rngs)

    def __call__(self, ids: TokenIds, mask: TokenMask) -> tuple[Tokens, Pooled]:
        """Token ids and their mask -> token states (b, s, e), zero at padding, and their mean (b, e)."""
        places = self.position(jnp.arange(ids.shape[1])) + self.token_type(jnp.zeros((1,), jnp.int32))
        states = self.encoder(self.norm(self.word(ids) + places[None]), mask)
        states = jnp.where(mask[..., None], states, 0)
        counts = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
        return states, states.sum(axis=1) / counts


class MiniLMTextEncoder:
    """A `TextEncoder` from a BERT network, its parameters and its tokenizer."""

    image_tokens = 0

    def __init__(self, network: Network, params: Held, tokenizer: Tokenizer) -> None:
        config = network.config
        require_match(params, network.abstract_params, what="the text encoder")
        if tokenizer.get_vocab_size() > config.vocabulary:
            raise UserError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the text encoder knows "
                f"{config.vocabulary}; take both files from the same model"
            )
        pad = "[PAD]"
        if tokenizer.token_to_id(pad) is None:
            raise UserError(f"the tokenizer has no {pad} token; a BERT tokenizer.json is needed")
        tokenizer.enable_truncation(config.length)
        tokenizer.enable_padding(length=config.length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
        self.length, self.width, self.pooled_width = config.length, config.width, config.width
        self.tokenizer = tokenizer
        self.params = params
        self._laid = params if isinstance(params, Lent) else apart(params)
        self._apply = jax.jit(network.__call__)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        length: int | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
        lend: Lend = at_once,
    ) -> MiniLMTextEncoder:
        """Reads config.json, model.safetensors and tokenizer.json; `length` overrides the config's.

        The parameters are laid over `mesh` by `SHARDING_RULES`, where one is given, when `lend` says.

        Raises:
          UserError: a file is missing, damaged, or doesn't fit the others.
        """
        folder = Path(folder)
        mapping = weights.read_config(folder / "config.json")
        if mapping.pop("model", None) != "bert":
            raise UserError(f'{folder / "config.json"} is not of a BERT text encoder (its "model" must be "bert")')
        forms = mapping.pop(stored.KEY, None)
        config = settings.build(BertConfig, mapping, where="text_encoder")
        if length is not None:
            config = dataclasses.replace(config, length=length)
        network = stored.as_written(Network.create(Bert, config), forms, "text_encoder/config.json")

        def read(mesh: jax.sharding.Mesh | None) -> Params:
            _, params = weights.load(folder)
            require_match(params, network.abstract_params, what="the text encoder")
            return sharding.lay(stored.cast(params, jnp.float32), mesh, SHARDING_RULES)

        tokenizer = read_tokenizer(folder / "tokenizer.json")
        return cls(network, lend(Source(network, read, mesh, SHARDING_RULES)), tokenizer)

    def tokenize(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> token ids (b, s) int32 and mask (b, s) bool; warns about every truncated prompt."""
        encodings = self.tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            warn_if_truncated(prompt, encoding, f"{self.length} tokens")
        ids = np.array([e.ids for e in encodings], np.int32)
        return ids, np.array([e.attention_mask for e in encodings], bool)

    def encode(self, prompts: Sequence[str], images: None = None) -> TextStates:
        """Encodes each prompt; see `TextEncoder.encode`."""
        require_prompts(prompts)
        ids, mask = self.tokenize(prompts)
        states, pooled = in_batches(self._apply, self._laid, (ids, mask))
        return TextStates(states, jnp.asarray(mask), pooled)


def require_prompts(prompts: Sequence[str]) -> None:
    """Raises `UserError` unless `prompts` is a list of at least one."""
    if isinstance(prompts, str) or not prompts:
        raise UserError("encode takes a non-empty list of prompts")


def in_batches(apply: Callable[..., Any], params: Held, inputs: Sequence[np.ndarray], *, limit: int = MAX_BATCH) -> Any:
    """`apply(params, *inputs)`, whose outputs are a tree of arrays (b, ...), by batches of at most `limit` rows.

    A batch is padded to a power of two, so that few sizes are ever compiled. Where the parameters lie on a mesh, it is
    compiled for that one, and the outputs come back whole to every process.
    """
    params = taken(params)
    mesh = sharding.mesh_of(params)
    apply = sharding.over(mesh, apply)
    made = []
    for start in range(0, len(inputs[0]), limit):
        count = min(len(inputs[0]) - start, limit)
        rows = np.arange(1 << (count - 1).bit_length()) % count + start
        batch = [array[rows] for array in inputs]
        outputs = apply(params, *(batch if mesh is None else sharding.spread(batch, mesh)))
        outputs = outputs if mesh is None else sharding.to_host(outputs)
        made.append(jax.tree.map(lambda leaf, count=count: leaf[:count], outputs))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *made)


def read_tokenizer(file: Path) -> Tokenizer:
    """Reads a tokenizer.json; raises `UserError` when it is missing or damaged."""
    if not Path(file).is_file():
        raise UserError(f"no file {file}; the text encoder needs its tokenizer beside its weights")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"can't read {file}: {error}; the file is damaged, copy it again") from None


def warn_if_truncated(prompt: str, encoding: Encoding, limit: str) -> None:
    """Warns with what a truncating tokenizer left out of a prompt, if anything; `limit` names its length."""
    if encoding.overflowing:
        ends = [end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask) if not special]
        warn_dropped(prompt[max(ends, default=0) :], limit)


def warn_dropped(dropped: str, limit: str) -> None:
    """Warns that the end of a prompt is not encoded."""
    warnings.warn(f"the prompt is longer than {limit}; this part of it was dropped: {dropped.strip()!r}", stacklevel=5)
