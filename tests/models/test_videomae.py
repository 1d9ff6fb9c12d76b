"""VideoMAE against transformers, through the published layout."""

import jax
import numpy as np
import pytest

from magic141_jax.convert import videomae as convert
from magic141_jax.convert.engine import to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.network import Network
from magic141_jax.models.videomae import VideoMAE, VideoMAEConfig
from tests.published_text import randomise, relative, tensors, videomae_sizes


def test_parity_with_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**videomae_sizes()))
    theirs = randomise(torch, theirs)
    clips = np.random.default_rng(0).normal(size=(2, 4, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        states = theirs.videomae(torch.tensor(clips).permute(0, 1, 4, 2, 3)).last_hidden_state
        wanted = theirs.fc_norm(states.mean(1)).numpy()
    config = convert.config_to_ours(videomae_sizes())
    network = Network.create(VideoMAE, config)
    params = to_ours(convert.complete(tensors(theirs), config), convert.table(config), network.abstract_params)
    assert relative(np.asarray(jax.jit(network.__call__)(params, clips)), wanted) < 1e-5


def test_clips_that_do_not_fit_are_refused():
    network = Network.create(VideoMAE, convert.config_to_ours(videomae_sizes()))
    with pytest.raises(UserError, match="4x16x16x3, got 5x16x16x3"):
        jax.eval_shape(network.__call__, network.abstract_params, np.zeros((1, 5, 16, 16, 3), np.float32))
    with pytest.raises(UserError, match="don't divide into tubes of 2 frames"):
        VideoMAEConfig(frames=5)
