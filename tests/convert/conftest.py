"""Published folders and networks with tiny random weights: written without our own writer, or as diffusers has them."""

import json
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.convert import hunyuan_dit, hunyuan_vae
from magic141_jax.convert.engine import from_ours
from magic141_jax.models import MODELS
from magic141_jax.models.hunyuan_vae import HunyuanVAEConfig
from magic141_jax.models.mmdit import MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten

DIT = MMDiTConfig(
    in_channels=9,
    out_channels=4,
    width=16,
    heads=2,
    head_width=8,
    double_blocks=2,
    single_blocks=3,
    refiner_blocks=2,
    rope_axes=(4, 2, 2),
    text_width=12,
    pooled_width=10,
)
VAE = HunyuanVAEConfig(block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4)
PARTS = {
    "transformer": ("mmdit", DIT, hunyuan_dit, ml_dtypes.bfloat16, 3),
    "vae": ("hunyuan_vae", VAE, hunyuan_vae, np.float32, 1),
}


def _tensors(part):
    """The published tensors of a part, every value random."""
    kind, config, module, dtype, _ = PARTS[part]
    generator = np.random.default_rng(0)
    flat = flatten(Network.create(MODELS[kind][1], config).abstract_params)
    params = {path: generator.normal(0, 0.3, leaf.shape).astype(dtype) for path, leaf in flat.items()}
    return from_ours(unflatten(params), module.table(config))


def _write(folder, part, tensors=None, shards=None, **change):
    """Writes config.json (with changes) and the tensors, in shards with an index where there are several."""
    _, config, module, _, usual = PARTS[part]
    tensors = _tensors(part) if tensors is None else tensors
    shards = usual if shards is None else shards
    folder.mkdir(parents=True)
    theirs = module.config_from_ours(config) | {"_diffusers_version": "0.33.0.dev0"} | change
    (folder / "config.json").write_text(json.dumps(theirs))
    names, stem = sorted(tensors), "diffusion_pytorch_model"
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def published_tensors():
    """part -> {published name: array}."""
    return _tensors


@pytest.fixture(scope="session")
def write_published():
    """(folder, part, tensors, shards, **changes of config.json) -> folder."""
    return _write


TEXT_LENGTHS = (7, 4)
GRID = (4, 6)


class Case(NamedTuple):
    """What a network of theirs was given and gave, and the arguments of ours; arrays are channels-last."""

    theirs: dict[str, Any]
    args: tuple[np.ndarray, ...]
    kwargs: dict[str, np.ndarray]
    output: np.ndarray


@pytest.fixture(scope="session")
def tiny_dit():
    """Makes HunyuanVideo's transformer as diffusers has it, for the settings that tell its variants apart."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.set_num_threads(1)

    def make(**variant):
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_single_layers": 3}
        widths = {"text_embed_dim": 24, "pooled_projection_dim": 12, "rope_axes_dim": (4, 6, 6)}
        return _randomise(diffusers.HunyuanVideoTransformer3DModel(out_channels=16, **sizes, **widths, **variant))

    return make


@pytest.fixture(scope="session")
def randomise():
    """(module of theirs, gain of its matrices) -> the module, every parameter drawn from torch's generator."""
    return _randomise


def _randomise(module, gain=1.0):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else gain * parameter[0].numel() ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else 0.0
            parameter.copy_(offset + scale * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A folder with a published transformer and VAE."""
    folder = tmp_path_factory.mktemp("published")
    for part in PARTS:
        _write(folder / part, part)
    return folder


@pytest.fixture(scope="session")
def dit_case():
    """Runs such a network on two prompts of unequal length at unequal times."""
    torch = pytest.importorskip("torch")

    def make(model, frames=3):
        torch.manual_seed(1)
        mask = torch.arange(7)[None] < torch.tensor(TEXT_LENGTHS)[:, None]
        inputs = {
            "hidden_states": torch.randn(2, model.config.in_channels, frames, *GRID),
            "timestep": torch.tensor([250.0, 875.0]),
            "encoder_hidden_states": torch.randn(2, 7, 24),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 12),
            "guidance": torch.tensor([6000.0, 1000.0]) if model.config.guidance_embeds else None,
        }
        with torch.no_grad():
            output = model(**inputs).sample.numpy().transpose(0, 2, 3, 4, 1)
        x, t, *text = (value.numpy() for value in inputs.values() if value is not None)
        kwargs = {"guidance": text.pop() / 1000} if model.config.guidance_embeds else {}
        if model.config.image_condition_type == "token_replace":
            kwargs["known"] = np.zeros((2, frames, *GRID, 1), np.float32)
            kwargs["known"][:, 0] = 1
        return Case(inputs, (x.transpose(0, 2, 3, 4, 1), t / 1000, *text), kwargs, output)

    return make
