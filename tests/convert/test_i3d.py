"""I3D's published names, there and back."""

import numpy as np
import pytest

from magic141_jax.convert import i3d
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.errors import UserError
from magic141_jax.models.i3d import I3D, I3DConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten


def test_there_and_back():
    network = Network.create(I3D, I3DConfig(3))
    generator = np.random.default_rng(0)
    drawn = {p: generator.random(leaf.shape, np.float32) for p, leaf in flatten(network.abstract_params).items()}
    theirs = from_ours(unflatten(drawn), i3d.TABLE)
    assert len(theirs) == 5 * (3 + 6 * 9) + 2
    assert {"Mixed_5c.b3b.bn.running_var", "Conv3d_1a_7x7.conv3d.weight", "logits.conv3d.weight"} <= theirs.keys()
    counted = {name.replace("running_var", "num_batches_tracked"): np.array(1) for name in theirs if "_var" in name}
    assert i3d.config_of(theirs) == I3DConfig(3)
    for path, leaf in flatten(to_ours(theirs | counted, i3d.TABLE, network.abstract_params)).items():
        np.testing.assert_array_equal(leaf, drawn[path])


def test_another_network_is_refused():
    with pytest.raises(UserError, match="pytorch-i3d's names"):
        i3d.config_of({"conv1.weight": np.zeros(3)})
    network = Network.create(I3D, I3DConfig(3))
    with pytest.raises(UserError, match=r"Conv3d_1a_7x7\.kernel"):
        to_ours({"logits.conv3d.bias": np.zeros(3)}, i3d.TABLE, network.abstract_params)
