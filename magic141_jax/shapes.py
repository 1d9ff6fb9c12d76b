"""The dimension key, once, and typed aliases for the arrays that cross module borders.

b batch                      t y x 3   pixel frames, channels last, values in [0, 1] unless said
f h w c  latents             l  video tokens        s  text and image tokens       j = s + l
n heads   k head width       d  model width         m  MLP width                   e  text width
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

Frames = Float[Array, "b t y x 3"]
Images = Float[Array, "b y x 3"]
Latents = Float[Array, "b f h w c"]
Tokens = Float[Array, "b s e"]
TokenMask = Bool[Array, "b s"]
TokenIds = Int[Array, "b s"]
Pooled = Float[Array, "b p"]
Times = Float[Array, " b"]
