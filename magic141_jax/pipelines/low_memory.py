"""Sampling where memory is short: one component at a time on the devices, cached text, the VAE in tiles.

Each is one keyword of `components.load_components` and one flag of sample.py, and each stands for itself. What they
save and cost is told in docs/published.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from magic141_jax.models.network import Network
from magic141_jax.models.resident import Lend, Room, at_once, when_needed
from magic141_jax.models.text import TextEncoder
from magic141_jax.models.tiling import WHOLE, in_squares
from magic141_jax.pipelines.text_cache import CachedTextEncoder, digest

LENT = ("transformer", "vae", "text_encoder", "image_encoder")


@dataclasses.dataclass(frozen=True)
class LowMemory:
    """What to save memory on; by default nothing.

    Attributes:
      offload: keep a component's parameters on the devices only while it computes; pipelines that share the devices
        are given the same `Room`.
      text_cache: a folder for the states of encoded prompts; with all of them there, no text encoder is read.
      vae_tiles: side in pixels of the squares in which larger pictures are encoded and decoded.

    Raises:
      UserError: a side that can't be.
    """

    offload: bool | Room = False
    text_cache: str | Path | None = None
    vae_tiles: int | None = None

    def __post_init__(self) -> None:
        if self.vae_tiles is not None:
            in_squares(WHOLE, self.vae_tiles)

    def lenders(self) -> dict[str, Lend]:
        """How each component's parameters are held, by its name."""
        if self.offload:
            room = self.offload if isinstance(self.offload, Room) else Room()
            return {name: room.lender() for name in LENT}
        text = at_once if self.text_cache is None else when_needed
        return dict.fromkeys(LENT, at_once) | {"text_encoder": text}

    def in_tiles(self, vae: Network) -> Network:
        """An autoencoder that works in tiles, if any are asked for; its parameters are the same."""
        if self.vae_tiles is None:
            return vae
        tiling = in_squares(vae.config.tiling, self.vae_tiles)
        return Network.create(vae.build, dataclasses.replace(vae.config, tiling=tiling))

    def remembering(self, encoder: TextEncoder, folders: Sequence[Path], dtype: str) -> TextEncoder:
        """A text encoder that keeps its states, if they are to be kept; `folders` are all that it was read from."""
        if self.text_cache is None:
            return encoder
        cache = Path(self.text_cache).expanduser()
        return CachedTextEncoder(encoder, cache, identity=f"{dtype} {digest(folders, cache)}")
