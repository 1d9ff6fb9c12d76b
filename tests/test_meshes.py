"""One device and eight, on every shape of mesh: the same losses and the same gradients, of training and distillation.

Numbers are float32 and agree within 1e-4 of the largest of their kind: sums are taken in another order. Sampling over
meshes is tested with the pipelines, the network alone in tests/models/test_mmdit.py.
"""

import jax
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.experiment import Experiment, make_config
from magic141_jax.models import mmdit
from magic141_jax.settings import to_dict
from magic141_jax.train import streams

pytestmark = pytest.mark.heavy

MODEL = {"model": "mmdit", **to_dict(mmdit.debug()), "remat": "full"}
ENCODER = {"model": "image_encoder", "patch": 8, "width": 8, "layers": 1, "heads": 1, "mlp": 16, "text_width": 12}
# 2 frames of 4 x 6 latents are 12 tokens, 16 image tokens and 5 of text make 21: eight divides neither.
DATA = {"path": "random", "height": 32, "width": 48, "num_frames": 5, "text_length": 5, "threads": 0}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "context": {"context": 8},
    "mixed": {"fsdp": 2, "tensor": 2, "context": 2},
}
DMD = {"name": "dmd", "walk": {"steps": 2}, "roles": {"rank": 2}}
RUNS = {
    "images and videos": ({"name": "flow_matching", "known_frames": (0.3, 0.7)}, MESHES),
    "distillation": ({**DMD, "known_frames": (0.3, 0.7), "guidance": 2.0}, ("fsdp", "context", "mixed")),
    "an adversary": ({**DMD, "known_frames": (0.0, 1.0), "matching": 0.0, "adversarial": {"weight": 1.0}}, ("mixed",)),
}


def gradients(config, workdir, mesh, devices):
    """Losses, metrics and gradients of all roles on the run's first batch."""
    experiment = Experiment.from_config({**config, "mesh": mesh}, workdir, devices=devices)
    method, state = experiment.method, experiment.initial_state()
    batch = sharding.shard_batch(streams.arrays(next(experiment.batches())), experiment.mesh)

    def program(params, frozen, batch):
        def loss(own, role):
            losses, seen = method.losses({**frozen, **params, role: own}, batch, jax.random.key(3), 0)
            return losses[role], (losses, seen)

        return {role: jax.value_and_grad(loss, has_aux=True)(params[role], role) for role in method.roles}

    return jax.jit(sharding.over(experiment.mesh, program))(state.params, dict(method.frozen), batch)


@pytest.mark.parametrize("name", RUNS)
def test_every_mesh_trains_as_one_device(name, weights_folder, tmp_path):
    method, meshes = RUNS[name]
    images = 8 if method["name"] == "flow_matching" else 0
    config = make_config(
        model=MODEL,
        image_encoder=ENCODER,
        method=method,
        data={**DATA, "image_batch": images, "video_batch": 8},
        teacher="" if images else str(weights_folder),
    ).to_dict()
    want = jax.device_get(gradients(config, tmp_path, {"data": 1}, jax.devices()[:1]))
    for mesh in meshes:
        got = jax.device_get(gradients(config, tmp_path, {"data": 1} | MESHES[mesh], jax.devices()))
        for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            message = f"{mesh} {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(one, other, atol=1e-4 * max(1, np.abs(other).max()), err_msg=message)
