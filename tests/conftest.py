"""Eight fake CPU devices, quick compilation, a shared cache of it, strict rank promotion; tiny random weights."""

import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiles three times faster, to slower code

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from magic141_jax import settings, weights
from magic141_jax.models import MODELS, mmdit
from magic141_jax.models.network import Network
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import flatten, unflatten

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "magic141-jax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

WORDS = ["a", "red", "blue", "shark", "cat", "moves", "left", "right", "on", "the", "background"]
SAMPLING = {
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "fps": 8,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "shift": 3.0,
    "sampler": "euler",
    "overlap_latents": 1,
    "history_noise": 0.1,
}
CONFIGS = {
    "transformer": ("mmdit", settings.to_dict(mmdit.debug())),
    "vae": ("patch_vae", {"latent_channels": 4, "widths": [8, 8], "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]}),
    "text_encoder": (
        "bert",
        {"vocabulary": 20, "positions": 16, "width": 12, "layers": 1, "heads": 2, "mlp": 24, "length": 12},
    ),
    "image_encoder": (
        "image_encoder",
        {"patch": 8, "width": 8, "layers": 1, "heads": 1, "mlp": 16, "text_width": 12},
    ),
}


def random_params(network, seed):
    """Random parameters without any initial zero, which would silence a branch; drawn without compiling anything."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        values = generator.normal(0, leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1, leaf.shape)
        return (values + path.endswith("scale")).astype(np.float32)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(network.abstract_params).items()})


def write_tokenizer(path):
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}, "[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(path))


@pytest.fixture
def command_line(monkeypatch, capsys):
    """(module, arguments) -> exit code, stdout and stderr of `python -m module`, run in this process."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(module, run_name="__main__")
        return stopped.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """A weights folder in the real layout: 32 x 32 pixels, windows of 9 frames, 8 a second."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    folder.mkdir()
    for seed, (name, (kind, config)) in enumerate(CONFIGS.items()):
        config_class, module = MODELS[kind]
        network = Network.create(module, settings.build(config_class, config))
        stored = {"model": kind, **settings.to_dict(network.config)}
        weights.save(folder / name, stored, random_params(network, seed), storage="bfloat16")
    write_tokenizer(folder / "text_encoder" / "tokenizer.json")
    weights.write_config(folder / "model_index.json", {"sampling": SAMPLING})
    return folder


@pytest.fixture(scope="session")
def pipeline(weights_folder):
    """The pipelines over `weights_folder`."""
    return TextToVideoPipeline.from_pretrained(weights_folder)


def is_ready(url):
    """Whether a server that listens says that it is ready."""
    try:
        with urllib.request.urlopen(f"{url}/readyz") as answer:
            return answer.status == 200
    except urllib.error.HTTPError:
        return False


@pytest.fixture
def start_server(weights_folder, tmp_path):
    """start(module, state, *flags) -> process, url: `python -m module` with the tiny weights, once it is ready."""
    processes = []

    def start(module, state, *flags):
        log = tmp_path / f"{len(processes)}.log"
        command = ["-m", module, "--port", "0", "--state", state, "--weights", weights_folder, "--upscale", "2", *flags]
        cache = {"MAGIC141_JAX_CACHE": jax.config.jax_compilation_cache_dir}
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, command)],
                    stderr=stream,
                    cwd=Path(__file__).parents[1],
                    env={**os.environ, **cache},
                )
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and processes[-1].poll() is None:
            if (found := re.search(r"http://[\d.:]+", log.read_text())) and is_ready(found[0]):
                return processes[-1], found[0]
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    yield start
    for process in processes:
        process.kill()
        process.wait()
