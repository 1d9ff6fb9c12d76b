"""What compilation costs: programs don't grow with depth, and a second process finds them in the persistent cache."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from magic141_jax.models import mmdit
from magic141_jax.models.network import Network

ROOT = Path(__file__).parents[2]


def equations(jaxpr):
    """How many equations a program has, those of its parts included."""
    return len(jaxpr.eqns) + sum(equations(each) for eqn in jaxpr.eqns for each in jaxprs_in_params(eqn.params))


def traced(depth, gradient):
    config = dataclasses.replace(
        mmdit.debug(), double_blocks=depth, single_blocks=2 * depth, refiner_blocks=depth, remat="full"
    )
    network = Network.create(mmdit.MMDiT, config)

    def loss(params, *inputs):
        return jnp.sum(network(params, *inputs) ** 2)

    shapes = [(1, 2, 4, 4, 9), (1,), (1, 3, 12), (1, 3), (1, 12)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(jax.grad(loss) if gradient else loss).trace(network.abstract_params, *inputs)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "step"])
def test_programs_do_not_grow_with_depth(gradient):
    shallow, deep = (traced(depth, gradient) for depth in (2, 20))
    assert equations(deep.jaxpr.jaxpr) == equations(shallow.jaxpr.jaxpr)
    lines = [each.lower().as_text().count("\n") for each in (shallow, deep)]
    assert lines[0] == lines[1] > 100


START = """
import json, sys
import jax
import numpy as np
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.pipelines.components import enable_compilation_cache, load_components
from magic141_jax.pipelines.engine import Engine
from magic141_jax.pipelines.options import resolve

counts = {"hits": 0, "misses": 0}

def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"

enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
components = load_components(sys.argv[1])
text, known = np.zeros((1, 12, 12)), np.zeros((1, 3, 4, 4, 5))
cond = Conditioning(text, np.ones((1, 12), bool), text[:, 0], known[..., :4], known[..., 4:])
jax.monitoring.register_event_listener(count)
latents = Engine(components).denoise(cond, None, resolve({}, components), purpose=1)
print(json.dumps(counts | {"sum": float(abs(latents).sum())}))
"""


def test_a_second_process_reads_the_sampler_from_the_cache(weights_folder, tmp_path):
    environment = {**os.environ, "MAGIC141_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start():
        done = subprocess.run(
            [sys.executable, "-c", START, str(weights_folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second = start(), start()
    assert first["misses"] > 0 == first["hits"] and any(tmp_path.iterdir())
    assert second["hits"] == first["misses"] and second["misses"] == 0
    assert second["sum"] == first["sum"] > 0
