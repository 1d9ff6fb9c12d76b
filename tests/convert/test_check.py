"""What `check` tells of a component, and that it names the first layer that differs from torch's."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from magic141_jax.convert import check, repository
from magic141_jax.errors import UserError
from magic141_jax.sharding import MeshConfig, make_mesh


def test_the_table(repo):
    component = repository.open_component(repo / "transformer")
    head, *rows, total, needed = check.describe(component, "bfloat16")
    assert "HunyuanVideoTransformer3DModel (diffusers 0.33.0.dev0) is our mmdit" in head
    row = next(row for row in rows if "single_blocks.joint.qkv.kernel" in row)
    assert row.split() == ["single_blocks.joint.qkv.kernel", "3x16x48", "bfloat16", "2,304", "4.6", "kB"]
    count = sum(int(np.prod(tensor.shape)) for tensor in component.tensors.values())
    assert f"{len(component.tensors)} tensors, {count:,} parameters" in total
    assert f"memory: {2 * count / 1000:.1f} kB in bfloat16 on each device" in needed and "free on cpu" in needed
    split = check.describe(component, "float32", make_mesh(MeshConfig(data=1, fsdp=8)))[-1]
    assert 0.5 * count / 1000 < float(split.split()[1]) < 4 * count / 1000


def test_component_folders(repo, tmp_path):
    assert check.component_folders(repo) == [repo / "transformer", repo / "vae"]
    assert check.component_folders(repo / "vae") == [repo / "vae"]
    for folder, message in ((tmp_path, "config.json"), (tmp_path / "none", "no folder")):
        with pytest.raises(UserError, match=message):
            check.component_folders(folder)


@pytest.fixture(scope="module")
def reference(repo):
    """Activations of diffusers' network, by the script that makes them."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    path = Path(__file__).parents[1] / "reference_activations.py"
    spec = importlib.util.spec_from_file_location("reference_activations", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = repo / "transformer"
    return script.record(
        diffusers.HunyuanVideoTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    )


def test_every_layer_equals_diffusers(repo, reference):
    rows = list(check.compare(*repository.load(repo / "transformer"), reference))
    assert [row.name for row in rows] == [
        "condition",
        "patch_in",
        "text_in",
        *(f"double_blocks.{stream}[{i}]" for i in range(2) for stream in ("video", "text")),
        *(f"single_blocks[{i}]" for i in range(3)),
        "output",
    ]
    assert max(row.error for row in rows) < 1e-5


def test_the_first_wrong_layer_is_found(repo, reference):
    network, params = repository.load(repo / "transformer")
    kernel = params["double_blocks"]["video"]["mlp_down"]["kernel"]
    params["double_blocks"]["video"]["mlp_down"]["kernel"] = kernel.at[1, 0, 0].add(1.0)
    wrong = [row.name for row in check.compare(network, params, reference) if row.error > 1e-4]
    assert wrong[0] == "double_blocks.video[1]" and wrong[-1] == "output"
    assert "double_blocks.text[1]" not in wrong


def test_bad_references(repo, reference):
    model = repository.load(repo / "transformer")
    for change, message in (
        ({"stray": np.zeros(1)}, "the unknown .'stray'."),
        ({"output": np.zeros((1, 2, 3))}, "output of the reference has shape"),
        ({"input.inputs": None}, "lacks the inputs .'inputs'."),
    ):
        changed = {name: value for name, value in (reference | change).items() if value is not None}
        with pytest.raises(UserError, match=message):
            list(check.compare(*model, changed))


def test_padded_text_does_not_count(repo, reference):
    garbage = {name: np.array(value) for name, value in reference.items()}
    garbage["text_in"][~garbage["input.text_mask"]] = 1e3
    rows = {row.name: row.error for row in check.compare(*repository.load(repo / "transformer"), garbage)}
    assert rows["text_in"] < 1e-5
