"""Composition: every config builds, keys are strict, many devices give one device's losses, weights go out and in."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from magic141_jax import settings, sharding, weights
from magic141_jax.convert.export import export
from magic141_jax.data import cache
from magic141_jax.errors import UserError
from magic141_jax.experiment import RULES, Experiment, make_config
from magic141_jax.models import mmdit
from magic141_jax.models.discriminator import SHARDING_RULES as HEAD_RULES
from magic141_jax.models.discriminator import FeatureHeads, FeatureHeadsConfig
from magic141_jax.models.network import Network
from magic141_jax.train import metrics

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(**changes):
    """The smallest autoencoder on emoji-sized frames."""
    config = make_config(
        model={
            "model": "patch_vae",
            "latent_channels": 4,
            "widths": (8, 8),
            "encoder_blocks": (0, 0),
            "decoder_blocks": (0, 0),
        },
        method={"name": "autoencoding", "init_records": 8},
        data={"video_batch": 8, "threads": 0},
        optimizer={"warmup_steps": 2},
        train={"steps": 4, "log_every": 1, "save_every": 2},
    )
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = config
        for key in parents:
            node = node[key]
        node[last] = value
    return config


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A raw prepared set of smooth moving clips."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    rng = np.random.default_rng(0)
    with cache.writing(folder) as writer:
        writer.metadata = {"kind": "raw", "fps": 8.0}
        for _ in range(16):
            frames = rng.integers(0, 256, (5, 2, 2, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
            writer.add("videos", "16x16x5", {"frames": frames, "caption": "x", "captions": ["x"], "tags": {}})
    return str(folder)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_documented_and_builds(path):
    module = load(path.stem)
    config = module.get_config()
    for word in ("Command: python train.py", "Hardware:", "Expected:", "Part:"):
        assert word in module.__doc__, word
    again = make_config(**config.to_dict())
    assert again.to_dict() == config.to_dict(), "every key is there with its default, so all can be overridden"
    if config.method.name == "flow_matching" and path.stem != "debug":
        config.data.path = "random"  # the data is not in the repository
        state = Experiment.from_config(config, Path("unused"), devices=jax.devices()[:1]).abstract_state
        assert set(state.params["student"]) == {"transformer", "image_encoder"}


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"config.model.model is 'mmdti'. Did you mean 'mmdit'"):
        make_config(model={"model": "mmdti"}, method={"name": "flow_matching"}, data={})
    with pytest.raises(UserError, match=r"config.method.name is 'flow'"):
        make_config(model={"model": "mmdit"}, method={"name": "flow"}, data={})
    with pytest.raises(UserError, match=r"unknown key config.method.caption_drop"):
        make_config(model={"model": "mmdit"}, method={"name": "flow_matching", "caption_drop": 0.1}, data={})
    with pytest.raises(UserError, match=r"unknown key config.optimiser. Did you mean 'optimizer'"):
        make_config(model={"model": "mmdit"}, method={"name": "flow_matching"}, data={}, optimiser={})


def test_data_that_does_not_fit_is_refused(clips, tmp_path):
    config = load("debug").get_config()
    config.data.path = clips
    with pytest.raises(UserError, match="holds raw records and this method needs latent ones"):
        Experiment.from_config(config, tmp_path, devices=jax.devices()[:1])
    with pytest.raises(UserError, match="batch size 6 does not split over 8"):
        Experiment.from_config(tiny(data__path=clips, data__video_batch=6), tmp_path)
    with pytest.raises(UserError, match="crop_size 12 is not a multiple of 8"):
        Experiment.from_config(tiny(data__path=clips, method__crop_size=12), tmp_path)


def test_a_folder_of_clips_is_prepared_once(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a", "b"):
        pictures = [Image.new("RGB", (24, 20), (10 * i, 80, 120)) for i in range(6)]
        pictures[0].save(folder / f"{name}.gif", save_all=True, append_images=pictures[1:], duration=125)
    (folder / "captions.csv").write_text("file,caption\na.gif,one\nb.gif,two\nc.gif,lost\n")
    small = {"data__path": str(folder), "data__height": 16, "data__width": 16, "data__num_frames": 5}
    config = tiny(**small, data__video_batch=2, method__init_records=0)
    for _ in range(2):
        experiment = Experiment.from_config(config, tmp_path / "run", devices=jax.devices()[:1])
    assert capsys.readouterr().out.count("c.gif") == 1, "what was left out is said, and preparing is done once"
    assert next(experiment.batches())["video"]["frames"].shape == (2, 5, 16, 16, 3)


@pytest.mark.heavy
def test_eight_devices_give_the_losses_of_one(clips, tmp_path):
    assert jax.device_count() == 8
    losses = []
    for name, devices, fsdp in (("one", 1, 1), ("many", 8, 2)):
        config = tiny(data__path=clips, mesh__fsdp=fsdp)
        experiment = Experiment.from_config(config, tmp_path / name, devices=jax.devices()[:devices])
        experiment.train(progress=False)
        losses.append([line["loss/vae"] for line in metrics.read(tmp_path / name)])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_discriminators_heads_are_laid_out_by_their_own_rules():
    state = {"params": {"discriminator": Network.create(FeatureHeads, FeatureHeadsConfig()).abstract_params}}
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    own, whole = (sharding.placements(state, mesh, rules) for rules in (HEAD_RULES, RULES))
    assert [place.spec for place in whole] == [place.spec for place in own]
    assert any("tensor" in place.spec for place in whole)


def test_weights_go_out_with_statistics_and_in_again(clips, tmp_path):
    experiment = Experiment.from_config(tiny(data__path=clips, train__sample_every=4), tmp_path)
    result = experiment.train(progress=False)
    assert (tmp_path / "samples" / "samples-000004.gif").exists()
    experiment.export(result.state, tmp_path / "out")
    config, params = weights.load(tmp_path / "out" / "vae")
    assert config["model"] == "patch_vae" and len(config["latent_mean"]) == 4
    assert len(config["latent_std"]) == 1 and config["latent_std"][0] > 0, "one deviation for all channels"
    ema = jax.device_get(result.state.ema["vae"])
    jax.tree.map(np.testing.assert_array_equal, ema, jax.device_get(params))
    # The last checkpoint holds the same, and another run may start from it.
    jax.tree.map(np.testing.assert_array_equal, ema, jax.device_get(experiment.restore().ema["vae"]))
    fresh = Experiment.from_config(tiny(data__path=clips, init_from=str(tmp_path / "out")), tmp_path / "next")
    jax.tree.map(np.testing.assert_array_equal, ema, jax.device_get(fresh.initial_state().params["vae"]))
    with pytest.raises(UserError, match="does not fit its config"):
        wider = tiny(data__path=clips, init_from=str(tmp_path / "out"), model__latent_channels=5)
        Experiment.from_config(wider, tmp_path / "wider").initial_state()


def test_a_decoder_trained_alone_keeps_the_latents(clips, tmp_path):
    first = Experiment.from_config(tiny(data__path=clips), tmp_path / "first")
    first.export(first.train(progress=False).state, tmp_path / "out")
    before, given = weights.load(tmp_path / "out" / "vae")
    alone = {"method__train_encoder": False, "optimizer__weight_decay": 0.0, "seed": 1}
    second = Experiment.from_config(tiny(data__path=clips, init_from=str(tmp_path / "out"), **alone), tmp_path / "next")
    second.export(second.train(progress=False).state, tmp_path / "new")
    after, trained = weights.load(tmp_path / "new" / "vae")
    assert before == after, "statistics included"
    for name in given:
        same = all(map(np.array_equal, jax.tree.leaves(given[name]), jax.tree.leaves(trained[name])))
        assert same == name.startswith(("embed", "encoder", "fold", "to_latent")) or not jax.tree.leaves(given[name])


def test_a_run_goes_on_only_with_its_own_network(clips, tmp_path, caplog):
    Experiment.from_config(tiny(data__path=clips), tmp_path).train(progress=False)
    with pytest.raises(UserError, match=r"model.latent_channels was 4 and is 5"):
        Experiment.from_config(tiny(data__path=clips, model__latent_channels=5), tmp_path).train(progress=False)
    changed = Experiment.from_config(tiny(data__path=clips, optimizer__learning_rate=1e-5, train__steps=5), tmp_path)
    assert changed.train(progress=False).step == 5
    assert "optimizer.learning_rate was 0.0003 and is 1e-05" in caplog.text and "steps" not in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["learning_rate"] == 1e-5


def test_a_start_fitted_to_the_data_is_better(clips, tmp_path):
    errors = []
    for count in (0, 8):
        experiment = Experiment.from_config(tiny(data__path=clips, method__init_records=count), tmp_path)
        record = {"video": {"frames": next(experiment.batches())["video"]["frames"]}}
        params = experiment.initial_state().params
        _, found = jax.jit(experiment.method.losses)(params, record, jax.random.key(0), 0)
        errors.append(float(found["video/psnr"]))
    assert errors[1] > errors[0] + 3
    assert dataclasses.is_dataclass(experiment.config)


@pytest.mark.heavy
def test_a_published_layout_is_distilled_from_states_with_image_rows(tmp_path):
    rng, rows, length = np.random.default_rng(0), 5, 8
    text = {"text_mask": np.arange(length) < length - 1, "pooled": np.zeros(8, np.float16)}
    with cache.writing(tmp_path / "data") as writer:
        writer.metadata = {"kind": "latent", "image_tokens": rows}
        for _ in range(4):
            states = {"text": rng.normal(size=(length, 8)).astype(np.float16), **text}
            latents = rng.normal(size=(2, 4, 4, 4)).astype(np.float16)
            anchor = np.zeros((32, 32, 3), np.uint8)
            writer.add("videos", "32x32x5", {"latents": latents, "anchor": anchor, **states})
        (writer.folder / cache.NULL_TEXT).write_bytes(save({"text": np.zeros((length, 8), np.float16), **text}))
    sizes = dataclasses.replace(mmdit.debug(), text_width=8, pooled_width=8)
    network = Network.create(mmdit.MMDiT, sizes)
    model = {"model": "mmdit", **settings.to_dict(network.config)}
    weights.save(tmp_path / "teacher" / "transformer", model, jax.device_get(network.init(jax.random.key(0))))
    config = make_config(
        model=model,
        method={
            "name": "guidance",
            "known_frames": (0.0, 1.0),
            "caption_dropout": 0.5,
            "roles": {"student": "adapter", "rank": 2},
        },
        data={"path": str(tmp_path / "data"), "video_batch": 2, "threads": 0},
        train={"steps": 1, "log_every": 1},
        teacher=str(tmp_path / "teacher"),
    )
    experiment = Experiment.from_config(config, tmp_path / "run", devices=jax.devices()[:1])
    record = next(experiment.batches())["video"]
    conditioner = experiment.method.backbone.conditioner
    cond = conditioner.clean(None, record, 1)
    assert cond.image_tokens == rows
    np.testing.assert_array_equal(conditioner.negative(cond).text[:, :rows], record["text"][:, :rows])
    assert experiment.train(progress=False).step == 1
    assert all(np.isfinite(line["loss/student"]) for line in metrics.read(tmp_path / "run"))
    config.method.known_frames = (0.5, 0.5)
    with pytest.raises(UserError, match=r"no text to video: set config.method.known_frames"):
        Experiment.from_config(config, tmp_path / "run", devices=jax.devices()[:1])


def test_only_a_method_with_a_teacher_is_watched(tmp_path):
    config = load("debug").get_config()
    config.watch.every = 1
    with pytest.raises(UserError, match=r"this method has none: set config.watch.every to 0"):
        Experiment.from_config(config, tmp_path / "run", devices=jax.devices()[:1]).train(progress=False)
    assert not (tmp_path / "run").exists()


def test_a_published_folder_may_be_the_teacher(tmp_path):
    network = Network.create(mmdit.MMDiT, dataclasses.replace(mmdit.debug(), time_features=256))
    stored, params = {"model": "mmdit", **settings.to_dict(network.config)}, network.init(jax.random.key(0))
    weights.save(tmp_path / "ours", stored, jax.device_get(params))
    export(tmp_path / "ours", tmp_path / "theirs" / "transformer")
    config = make_config(
        model=stored | {"compute_dtype": "bfloat16"},
        method={"name": "dmd", "roles": {"student": "adapter", "teacher_dtype": "bfloat16", "rank": 2}},
        data={"path": "random", "video_batch": 2, "height": 16, "width": 16, "num_frames": 5, "threads": 0},
        mesh={"data": 1, "fsdp": -1},
        teacher=str(tmp_path / "theirs"),
    )
    frozen = Experiment.from_config(config, tmp_path, devices=jax.devices()[:2]).method.frozen["teacher"]
    kernels = [tree["double_blocks"]["video"]["qkv"]["kernel"] for tree in (params, frozen["transformer"])]
    np.testing.assert_array_equal(kernels[0].astype(jnp.bfloat16), kernels[1])
    assert kernels[1].addressable_shards[0].data.shape == (1, 16 // 2, 48)
