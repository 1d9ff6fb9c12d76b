"""The steps of tiny experiments by shapes alone, and one compiled for a TPU slice by the command."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from magic141_jax import settings, sharding
from magic141_jax.aot import hlo, program, report, topology, training
from magic141_jax.errors import UserError
from magic141_jax.experiment import make_config
from magic141_jax.models import lora, mmdit
from magic141_jax.models.network import Network
from magic141_jax.pytree import count

ROOT = Path(__file__).parents[2]
NETWORK = Network.create(mmdit.MMDiT, mmdit.debug())
MODEL = {"model": "mmdit", **settings.to_dict(mmdit.debug())}
DATA = {"path": "nowhere", "height": 16, "width": 16, "num_frames": 5, "video_batch": 4, "text_length": 3}


def config(method, **rest):
    return make_config(model=MODEL, method=method, data=DATA, mesh={"data": 1, "fsdp": -1}, **rest)


def dmd(**roles):
    return config({"name": "dmd", "roles": {"rank": 2, **roles}}, teacher="nowhere")


def shapes(values, chips, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return training.train(values.to_dict(), topology.make(f"h100:{chips}"))


def test_roles_are_held_as_counted_and_nothing_is_read(monkeypatch):
    made = shapes(dmd(student="full", fake="adapter", teacher_dtype="bfloat16"), 1, monkeypatch)
    whole, adapter = count(NETWORK.abstract_params), count(lora.adapted(NETWORK, 2).abstract_params)
    adapter -= whole
    held = program.held(made)
    assert held["teacher, frozen"] == 2 * whole
    assert held["student, parameters"] == held["student, average"] == 4 * whole
    assert held["fake, parameters"] == 4 * adapter
    assert 0 <= held["fake, moments"] - 8 * adapter <= 64 >= held["student, moments"] - 8 * whole >= 0  # and counters
    latents, tokens = 4 * 2 * 2 * 2 * 4, 4 * 3 * 12
    assert held["batch"] == 2 * (latents + tokens + 4 * 12) + 4 * 3 + 4 * 16 * 16 * 3


def test_leaves_have_the_shardings_of_training(monkeypatch):
    made = shapes(dmd(student="adapter"), 4, monkeypatch)
    state, batch, frozen = made.arguments
    assert len({leaf.sharding.mesh for leaf in jax.tree.leaves(made.arguments)}) == 1
    assert batch["video"]["latents"].sharding.shard_shape((4, 2, 2, 2, 4))[0] == 1
    kernel = frozen["teacher"]["transformer"]["double_blocks"]["video"]["qkv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 16 // 4, 48)
    assert state.params.keys() == {"student", "fake"} and made.static == {"active": ("student", "fake")}
    described = made.description
    assert described["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1} and described["samples"] == 1
    assert described["roles"] == ["student", "fake"] and described["clip"] == [5, 16, 16]
    assert described["what"] == "step 0 of dmd updates student and fake"


@pytest.mark.parametrize("name", ["hunyuan13b_distil_tpu", "hunyuan13b_distil_h100"])
def test_13_billion_parameters_are_held_once(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(ROOT)
    spec.loader.exec_module(module)
    made = shapes(module.get_config(), 8, monkeypatch)
    held = program.held(made)
    assert 25.6e9 / 8 < held.pop("teacher, frozen") < 25.8e9 / 8  # bfloat16, in eighths
    assert sum(held.values()) < 1.5e9 and "fake, average" not in held
    assert made.description["samples"] == 1


def test_other_models_are_refused(monkeypatch):
    values = make_config(model={"model": "patch_vae"}, method={"name": "autoencoding"}, data={"video_batch": 8})
    with pytest.raises(UserError, match="only steps of the model 'mmdit'"):
        shapes(values, 1, monkeypatch)
    with pytest.raises(UserError, match=r"--batch is of the programs that sample"):
        training.train(dmd().to_dict(), topology.make("h100:1"), batch=2)


@pytest.mark.heavy
def test_a_step_compiles_for_a_slice(command_line, tmp_path, libtpu):
    values = config({"name": "flow_matching", "known_frames": (0.0, 1.0)})
    file = tmp_path / "tiny.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values.to_dict()})\n"
    )
    saved = tmp_path / "tiny.json"
    code, output, errors = command_line(
        "magic141_jax.aot", f"--config={file}", "--topology=v6e:2x2", f"--json={saved}", "--config.optimizer.b1=0.8"
    )
    assert code == 0, errors
    results = json.loads(saved.read_text())
    assert results["fits"] is True and "fits: " in output
    held, memory = sum(results["held"].values()), results["memory"]
    assert held <= memory["arguments"] and memory["temporaries"] > 0  # arguments are padded to the chip's tiles
    assert memory["aliased"] > 0.9 * sum(s for name, s in results["held"].items() if name.startswith("student"))
    assert set(results["collectives"]) & {"all-gather", "collective-permute"}  # weights lie in slices
    assert results["collectives"]["all-reduce"]["bytes"] > 0  # gradients are summed
    assert results["flops"] > 3 * 2 * 4 * 8 * count(NETWORK.abstract_params["single_blocks"])  # 4 clips, 8 tokens each
    assert results["seconds_at_peak"] == results["flops"] / (4 * topology.CHIPS["v6e"].rate)
    times = results["roofline"]
    assert times["roofline"] == max(times["operations"], times["hbm"], times["interconnect"]) > 0
    assert results["program"] == "train" and {"temporaries", "student, moments"} <= {
        reason["what"] for reason in results["reasons"]
    }
    assert results["command"].endswith("--topology=v6e:2x2 --config.optimizer.b1=0.8")
    page = tmp_path / "page.md"
    page.write_text("\n".join(("# Layouts", *report.MARKERS, "the end")))
    saved.rename(tmp_path / "a.json")
    code, output, errors = command_line("magic141_jax.aot", f"--table={tmp_path}", f"--page={page}")
    assert (
        code == 0
        and "| tiny, v6e:2x2 | train | fsdp 4 | 4 of 16x16x5 |" in page.read_text()
        and "the end" in page.read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config and --topology are needed"),
        (["--topology=v6e:2x2"], "--config and --topology are needed"),
        ([f"--config={ROOT / 'configs/debug.py'}", "--topology=v9:2"], "unknown chip 'v9'"),
        ([f"--config={ROOT / 'configs/debug.py'}", "--topology=h100:1", "--json=no/folder.json"], "no folder no"),
        ([f"--config={ROOT / 'configs/debug.py'}", "--topology=h100:1", "--program=smapler"], "mean 'sampler'"),
        (["--table=no/folder"], "no results"),
    ],
)
def test_mistakes_are_one_line(command_line, arguments, message):
    code, _, errors = command_line("magic141_jax.aot", *arguments)
    assert code == 2 and message in errors and errors.count("\n") == 1


@pytest.mark.heavy
def test_weights_travel_and_activations_stay():
    """Four times the tokens move no byte more: a layer's weights are gathered, never the batch."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
    params, rules = NETWORK.abstract_params, mmdit.SHARDING_RULES
    params = jax.tree.map(program.struct, params, sharding.shardings(params, mesh, rules, small=0))

    def loss(params, *inputs):
        return jnp.sum(NETWORK(params, *inputs) ** 2)

    def moved(side):
        split = sharding.batch_sharding(mesh)
        shapes = [(8, 2, side, side, 9), (8,), (8, 3, 12), (8, 3), (8, 12)]
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split) for shape in shapes]
        step = jax.jit(sharding.over(mesh, jax.grad(loss)), out_shardings=jax.tree.map(lambda x: x.sharding, params))
        return hlo.collectives(step.lower(params, *inputs).compile().as_text())

    small = moved(4)
    assert small["all-gather"]["bytes"] > 0 and moved(8) == small
