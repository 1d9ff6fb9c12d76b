"""The light VAE's decoder (`magic141_jax.models.patch_vae`) written in torch, for races: same weights, same operations.

Frames and latents are channels last, as there; convolutions see them as images in torch's channels-last memory format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-6


class Linear(nn.Module):
    """y = x W + b from a kernel (in, out) and perhaps a bias."""

    def __init__(self, params):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(params["kernel"]).T.contiguous())
        self.bias = nn.Parameter(torch.tensor(params["bias"])) if "bias" in params else None

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class ImageConv(nn.Module):
    """A 3x3 convolution over each frame, from a kernel (3, 3, in, out)."""

    def __init__(self, params):
        super().__init__()
        kernel = torch.tensor(params["kernel"]).permute(3, 2, 0, 1)
        self.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.tensor(params["bias"]))

    def forward(self, x):
        """(b, f, h, w, in) -> (b, f, h, w, out)."""
        y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), self.weight, self.bias, padding=1)
        return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class Block(nn.Module):
    """x + MLP(silu(conv(norm x) + W prev(norm x)))."""

    def __init__(self, params):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(params["scale"]))
        self.conv = ImageConv(params["conv"])
        self.previous, self.expand, self.contract = (Linear(params[n]) for n in ("previous", "expand", "contract"))

    def forward(self, x):
        """(b, f, h, w, c), kept."""
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * self.scale
        before = F.pad(y[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        y = F.silu(self.conv(y) + self.previous(before))
        return x + self.contract(F.silu(self.expand(y)))


class PatchDecoder(nn.Module):
    """Raw latents (b, f, h, w, c) -> frames (b, t, y, x, 3), from the parameters of a `PatchVAE` as numpy arrays."""

    def __init__(self, params, patch=4):
        super().__init__()
        self.patch = patch
        self.from_latent = ImageConv(params["from_latent"])
        for level in ("decoder_coarse", "decoder_fine"):
            blocks = [Block(params[level][key]) for key in sorted(params[level], key=int)]
            setattr(self, level, nn.ModuleList(blocks))
        for name in ("unfold", "to_pixels", "decoder_shortcut"):
            setattr(self, name, Linear(params[name]))

    def forward(self, raw):
        """Decodes a clip whole."""
        x = self.from_latent(raw)
        for block in self.decoder_coarse:
            x = block(x)
        x = unfold(self.unfold(x), 1, 2)
        for block in self.decoder_fine:
            x = block(x)
        frames = unfold(self.to_pixels(x), self.patch, self.patch)
        frames = frames + unfold(self.decoder_shortcut(raw), self.patch, 2 * self.patch)
        return frames[:, self.patch - 1 :]


def unfold(x, time, space):
    """(b, f, h, w, time space^2 c) -> (b, f time, h space, w space, c)."""
    b, f, h, w, _ = x.shape
    x = x.reshape(b, f, h, w, time, space, space, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(b, f * time, h * space, w * space, -1)
