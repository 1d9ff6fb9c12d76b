"""The command line of the conversions, run in this process."""

import functools

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax import settings, weights
from magic141_jax.convert import check, repository
from magic141_jax.convert.tensors import open_tensors


@pytest.fixture
def call(command_line):
    """(arguments) -> exit code, stdout, stderr."""
    return functools.partial(command_line, "magic141_jax.convert.__main__")


@pytest.fixture
def repo(write_published, tmp_path):
    for part in ("transformer", "vae"):
        write_published(tmp_path / "repo" / part, part)
    return tmp_path / "repo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("chekc", "SRC"), "invalid choice"),
        (("check", "nowhere"), "no weights folder nowhere"),
        (("check", "SRC", "--dtype", "float8"), "invalid choice"),
        (("export", "nowhere", "DST"), "no weights folder nowhere"),
        (("export", "SRC", "DST", "--format", "original"), "invalid choice"),
    ],
)
def test_mistakes_are_one_line(call, arguments, message):
    code, _, stderr = call(*arguments)
    assert code == 2 and message in stderr and stderr.count("\n") == 1


def test_check(call, repo):
    code, stdout, stderr = call("check", repo, "--dtype", "bfloat16", "--fsdp", 8)
    assert (code, stderr) == (0, "")
    assert "is our mmdit" in stdout and "is our hunyuan_vae" in stdout and "in bfloat16 on each device" in stdout
    (repo / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    code, stdout, stderr = call("check", repo)
    assert code == 2 and "is our mmdit" in stdout and "NOT READABLE" in stdout and "vae of" in stderr


def test_check_against_a_reference(call, repo, tmp_path):
    """A reference made by our own network agrees with it; one with a wrong layer is told apart."""
    network, params = repository.load(repo / "transformer")
    generator = np.random.default_rng(0)
    shapes = {"inputs": (1, 2, 4, 4, 9), "text": (1, 3, 12), "pooled": (1, 10)}
    inputs = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    inputs |= {"t": np.full(1, 0.5, np.float32), "text_mask": np.ones((1, 3), bool)}
    output, outputs = network(params, **inputs, intermediates=True)
    reference = {f"input.{name}": value for name, value in inputs.items()} | {"output": np.array(output)}
    reference |= {name: np.array(value) for name, value in outputs.items()}
    save_file(reference, tmp_path / "ref.safetensors")
    code, stdout, _ = call("check", repo, "--reference", tmp_path / "ref.safetensors")
    assert code == 0 and "all layers agree within 0.0001" in stdout
    reference["single_blocks"][1, 0, 5] += 0.5
    reference["output"][...] = np.nan
    save_file(reference, tmp_path / "ref.safetensors")
    code, stdout, _ = call("check", repo / "transformer", "--reference", tmp_path / "ref.safetensors")
    assert code == 1 and "the first layer that differs is single_blocks[1]" in stdout
    assert stdout.count("<-") == 2
    assert set(outputs) | {"output"} == {name for group in check.OUTPUTS for name in group}


def test_export(call, repo, tmp_path):
    component = repository.open_component(repo / "vae")
    _, params = repository.load(repo / "vae")
    weights.save(tmp_path / "ours", {"model": component.kind, **settings.to_dict(component.network.config)}, params)
    code, stdout, _ = call("export", tmp_path / "ours", tmp_path / "back", "--dtype", "float16")
    assert code == 0 and "wrote" in stdout
    assert {tensor.dtype for tensor in open_tensors(tmp_path / "back").values()} == {np.dtype(np.float16)}
