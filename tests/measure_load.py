"""Measures how much host memory it takes to load a published transformer of any depth. From the repository's root:

    python tests/measure_load.py make FOLDER                   the published 13B layout in bfloat16, 26 GB on disk
    python tests/measure_load.py load FOLDER                   onto the first device
    python tests/measure_load.py load FOLDER --drop            each parameter is dropped once it is complete
    python tests/measure_load.py make FOLDER --double 10 --single 20

`load` prints JSON: the bytes of the parameters, of the largest tensor and of the largest parameter; the peak of
anonymous host memory beyond what the process had before (file pages don't count: the system takes them back when it
needs room), which on a CPU includes the parameters themselves; and seconds.
"""

import argparse
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from magic141_jax.convert import hunyuan_dit, repository, tensors
from magic141_jax.convert.engine import OnDevices, plan_out, to_ours
from magic141_jax.convert.memory import layout
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten


class Dropped(OnDevices):
    """Places parameters as usual, then lets go of each: what a host sees that feeds other devices."""

    def whole(self, path, array):
        super().whole(path, array)
        return 0

    def write(self, path, stack, array, *, layer):
        last = layer == stack.shape[0] - 1
        stack = super().write(path, stack, array, layer=layer)
        return 0 if last else stack


class Watch:
    """The peak of this process's anonymous memory while a block runs, in bytes beyond that at its start."""

    def __enter__(self):
        self.start = self.peak = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.peak -= self.start

    def run(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, anonymous())


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def make(folder, config):
    """Writes config.json and bfloat16 tensors that are all ones, tensor by tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hunyuan_dit.config_from_ours(config)))
    abstract = flatten(Network.create(MMDiT, config).abstract_params)
    _, made = plan_out(abstract, hunyuan_dit.table(config))
    made = {name: jax.ShapeDtypeStruct(leaf.shape, ml_dtypes.bfloat16) for name, leaf in sorted(made.items())}
    values = ((name, np.ones(leaf.shape, leaf.dtype)) for name, leaf in made.items())
    tensors.write(folder, "diffusion_pytorch_model", made, values)


def load(folder, drop=False):
    """Loads the folder and returns what it took."""
    jax.numpy.zeros(1).block_until_ready()
    with Watch() as watch:
        began = time.time()
        if drop:
            component = repository.open_component(folder)
            abstract = component.network.abstract_params
            place = Dropped(flatten(layout(abstract, None)), "bfloat16")
            to_ours(component.tensors, component.table, abstract, place=place)
        else:
            component, (_, params) = repository.open_component(folder), repository.load(folder, dtype="bfloat16")
            jax.block_until_ready(params)
        seconds = time.time() - began
    sizes = [2 * leaf.size for leaf in jax.tree.leaves(component.network.abstract_params)]
    return {
        "parameters": sum(sizes),
        "largest_tensor": max(tensor.nbytes for tensor in component.tensors.values()),
        "largest_parameter": max(sizes),
        "peak": watch.peak,
        "seconds": round(seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "load"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=MMDiTConfig.double_blocks)
    parser.add_argument("--single", type=int, default=MMDiTConfig.single_blocks)
    parser.add_argument("--heads", type=int, default=MMDiTConfig.heads)
    parser.add_argument("--drop", action="store_true")
    args = parser.parse_args()
    if args.command == "make":
        size = {"width": 128 * args.heads, "heads": args.heads}
        make(
            args.folder,
            dataclasses.replace(MMDiTConfig(), double_blocks=args.double, single_blocks=args.single, **size),
        )
    else:
        print(json.dumps(load(args.folder, args.drop)))


if __name__ == "__main__":
    main()
