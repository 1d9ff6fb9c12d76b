"""VideoMAE's names and configs: old and new names of biases, keys without any, what is refused."""

import numpy as np
import pytest

from magic141_jax.convert import videomae
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.videomae import VideoMAE, VideoMAEConfig
from magic141_jax.pytree import flatten
from tests.published_text import draw, videomae_sizes

CONFIG = videomae.config_to_ours(videomae_sizes())


def test_published_and_newer_names_give_the_same():
    network = Network.create(VideoMAE, CONFIG)
    params = draw(network)
    params["encoder"]["layers"]["k"]["bias"][:] = 0
    theirs = from_ours(params, videomae.table(CONFIG))
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("key.bias")}
    published = {n.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): t for n, t in theirs.items()}
    assert sum(name.endswith("q_bias") for name in published) == CONFIG.layers
    for tensors in (theirs, published):
        read = videomae.complete({**tensors, "classifier.weight": np.ones((3, 2))}, CONFIG)
        back = flatten(to_ours(read, videomae.table(CONFIG), network.abstract_params))
        for path, leaf in flatten(params).items():
            np.testing.assert_array_equal(back[path], leaf)
    without = {name: tensor for name, tensor in theirs.items() if not name.startswith("fc_norm")}
    with pytest.raises(UserError, match=r"norm\.bias"):
        to_ours(videomae.complete(without, CONFIG), videomae.table(CONFIG), network.abstract_params)


def test_configs():
    assert videomae.config_to_ours({"model_type": "videomae"}) == VideoMAEConfig()
    with pytest.raises(UserError, match="use_mean_pooling = False"):
        videomae.config_to_ours({"model_type": "videomae", "use_mean_pooling": False})
    with pytest.raises(UserError, match="model_type"):
        videomae.config_to_ours({"model_type": "vivit"})
