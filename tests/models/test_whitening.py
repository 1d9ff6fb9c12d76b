"""Text maps fitted to captions: of unit size, decorrelated, without a mean, whether there is a refiner or not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.models.mmdit import MMDiT, debug
from magic141_jax.models.network import Network
from magic141_jax.models.whitening import fit_text


def test_fitted_text_maps_hear_quiet_directions():
    """States that share a large mean and differ loudly in one direction: fitted features are of unit size anyway."""
    rng = np.random.default_rng(0)
    loudness = np.geomspace(3, 0.5, 12)
    text = (5 + rng.normal(size=(400, 6, 12)) * loudness).astype(np.float32)
    mask = np.arange(6)[None] < rng.integers(1, 7, 400)[:, None]
    pooled = (text * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    fresh = Network.create(MMDiT, debug()).init(jax.random.key(0))
    params = fit_text(fresh, jnp.asarray(text), jnp.asarray(mask), jnp.asarray(pooled))
    linears = {
        "text_in.project": (params["text_in"]["project"], fresh["text_in"]["project"], text[mask]),
        "text_in.pooled": (params["text_in"]["pooled"]["up"], fresh["text_in"]["pooled"]["up"], pooled),
        "pooled_in": (params["pooled_in"]["up"], fresh["pooled_in"]["up"], pooled),
    }
    for name, (linear, before, rows) in linears.items():
        kernel, bias = np.asarray(linear["kernel"]), np.asarray(linear["bias"])
        features = (rows - rows.mean(0)) @ kernel
        np.testing.assert_allclose(features.var(), np.square(before["kernel"]).sum() / 16, rtol=0.2, err_msg=name)
        np.testing.assert_allclose((rows @ kernel + bias).mean(0), 0, atol=2e-3, err_msg=name)
        quiet, loud = (np.square(kernel[i] * loudness[i]).sum() for i in (-1, 0))
        assert quiet > 0.25 * loud, f"{name}: plain states would give 1 / 36"


def test_without_a_refiner_the_linear_map_alone_is_fitted():
    plain = Network.create(MMDiT, dataclasses.replace(debug(), refiner_blocks=0)).init(jax.random.key(0))
    text, pooled = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(20, 3, 12), (20, 12)]))
    fitted = fit_text(plain, text, jnp.ones((20, 3), bool), pooled)
    assert fitted["text_in"].keys() == {"project"}
    before, after = plain["text_in"]["project"], fitted["text_in"]["project"]
    assert jnp.abs(after["kernel"] - before["kernel"]).max() > 1e-3
