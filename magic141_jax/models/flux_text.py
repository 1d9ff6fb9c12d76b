"""The text side of FLUX.1: T5's states of the prompt's tokens, and CLIP's pooled vector of the prompt.

Prompts are padded to a fixed length, 256 tokens for FLUX.1 schnell and 512 for dev. Padding counts: T5 reads it like
any token, and the transformer attends to all states, so the mask is true everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.resident import Held, require_match
from magic141_jax.models.text import TextStates, in_batches, require_prompts, warn_if_truncated
from magic141_jax.shapes import Pooled, TokenIds

PAD = "<pad>"
MAX_BATCH = 8  # scores of one layer of T5 XXL for 8 prompts of 512 tokens: 0.5 GB


class FluxTextEncoder:
    """A `TextEncoder` from a T5 network, its parameters and tokenizer, and a function for the pooled vectors."""

    image_tokens = 0

    def __init__(
        self,
        network: Network,
        params: Held,
        tokenizer: Tokenizer,
        *,
        pool: Callable[[Sequence[str]], Pooled],
        pooled_width: int,
        length: int = 512,
    ) -> None:
        """Takes the tokenizer over: its padding and truncation are set.

        Args:
          network: of a `T5`.
          params: its parameters, on any devices.
          tokenizer: from tokenizer.json (`text.read_tokenizer`).
          pool: prompts -> (b, p), CLIP's pooled vectors of the prompts as they are.
          pooled_width: p.
          length: s, the tokens of a padded prompt, its end token included.

        Raises:
          UserError: parts that don't fit together, or no room for a token.
        """
        require_match(params, network.abstract_params, what="the T5 text encoder")
        vocabulary = network.config.vocabulary
        pad = tokenizer.token_to_id(PAD)
        if tokenizer.get_vocab_size() > vocabulary or pad is None:
            raise UserError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens and {'no' if pad is None else 'a'} {PAD}; this "
                f"text encoder needs a {PAD} and knows {vocabulary} tokens: take both from the same model"
            )
        if length < 2:
            raise UserError(f"a text length of {length} tokens; at least 2 are needed, one for the end")
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad, pad_token=PAD)
        self.length, self.width, self.pooled_width = length, network.config.width, pooled_width
        self.tokenizer, self.pool, self.params = tokenizer, pool, params
        self._apply = jax.jit(lambda params, ids: network(params, ids).astype(jnp.float32))

    def tokenize(self, prompts: Sequence[str]) -> TokenIds:
        """Prompts -> token ids (b, s), int32; warns about every truncated prompt."""
        encodings = self.tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            warn_if_truncated(prompt, encoding, f"{self.length} tokens")
        return np.array([encoding.ids for encoding in encodings], np.int32)

    def encode(self, prompts: Sequence[str], images: None = None) -> TextStates:
        """Encodes each prompt; see `TextEncoder.encode`. The mask is true for padding as well."""
        require_prompts(prompts)
        ids = self.tokenize(prompts)
        states = in_batches(self._apply, self.params, (ids,), limit=MAX_BATCH)
        pooled = jnp.asarray(self.pool(prompts), jnp.float32)
        if pooled.shape != (wanted := (len(prompts), self.pooled_width)):
            raise ValueError(f"pool gave an array of shape {pooled.shape}, not {wanted}")
        return TextStates(states, jnp.ones(ids.shape, bool), pooled)
