"""Rows from the command line; then samples and measures with tiny random weights and with true clips."""

import collections
import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import settings, weights
from magic141_jax.convert import hunyuan_dit, lora
from magic141_jax.diffusion import guidance, samplers, timesteps
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.errors import UserError
from magic141_jax.evaluation import compare, metrics, protocol, standing
from magic141_jax.evaluation.compare import Loaded, Made, Plan, Row
from magic141_jax.evaluation.features import FeatureSpace
from magic141_jax.pipelines.components import load_model
from magic141_jax.pipelines.options import PipelineOutput, SamplingOptions, resolve
from magic141_jax.pytree import flatten, unflatten
from magic141_jax.quantize import __main__ as quantize


def test_rows():
    texts = ["teacher = some/dir : steps=50, guidance=1.5", "a b=default", "c=x:shift=3,sampler=renoise"]
    texts.append("i2v@100=x:transformer=runs/t,steps=4,lora=a.safetensors")
    rows = compare.read_rows(texts)
    assert rows == (
        Row("teacher", "some/dir", {"num_inference_steps": 50, "guidance_scale": 1.5}),
        Row("a b", "default", {}),
        Row("c", "x", {"shift": 3.0, "sampler": "renoise"}),
        Row("i2v@100", "x", {"num_inference_steps": 4}, lora="a.safetensors", transformer="runs/t"),
    )
    assert compare.read_rows([compare.write_row(row) for row in rows]) == rows


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least two --row"),
        (["a=default"], "at least two --row"),
        (["a=x", "b=x", "a=y"], "2 rows are named 'a'"),
        (["a", "b=x"], "can't read the row 'a'; a row is label=FOLDER"),
        (["=x", "b=x"], "can't read the row"),
        (["a=:steps=1", "b=x"], "can't read the row"),
        (["a|b=x", "b=x"], "can't read the row"),
        (["a=x:stpes=4", "b=x"], "row a: unknown key 'stpes'. Did you mean 'steps'"),
        (["a=x:4", "b=x"], "row a: '4' is no key=value"),
        (["a=x:", "b=x"], "row a: '' is no key=value"),
        (["a=x:steps=4.5", "b=x"], "row a: steps is '4.5'; it must be a whole number"),
        (["a=x:guidance=no", "b=x"], "row a: guidance is 'no'; it must be a number"),
        (["a=x:steps=4,steps=5", "b=x"], "row a: steps is given twice"),
        (["a=x:lora=", "b=x"], "row a: 'lora=' is no key=value"),
    ],
)
def test_bad_rows(texts, message):
    with pytest.raises(UserError) as raised:
        compare.read_rows(texts)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_seeds_and_splits():
    assert compare.read_seeds("0, 7,12") == (0, 7, 12)
    assert compare.read_names("triples, train", "--splits", protocol.SPLITS) == ("triples", "train")
    for text in ("", "a", "1,", "-1", "1.5", "99999999999"):
        with pytest.raises(UserError, match="--seeds is"):
            compare.read_seeds(text)
    with pytest.raises(UserError, match="Did you mean 'train'"):
        compare.read_names("trian", "--splits", protocol.SPLITS)
    with pytest.raises(UserError, match="--seeds names 1 twice"):
        compare.read_seeds("1,01")
    with pytest.raises(UserError, match="--splits names train twice"):
        compare.read_names("train,train", "--splits", protocol.SPLITS)


def test_noise_is_the_same_for_all_rows_and_differs_elsewhere():
    drawn = compare.noise_seeds(3, "train", 5, draws=2)
    np.testing.assert_array_equal(drawn, compare.noise_seeds(3, "train", 5, draws=2))
    others = [compare.noise_seeds(4, "train", 5, draws=2), compare.noise_seeds(3, "triples", 5, draws=2)]
    assert len(np.unique([drawn, *others])) == 30


@pytest.mark.parametrize("sampler", ["euler", "heun", "renoise"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_evaluations_are_those_of_the_sampler(sampler, scale):
    """Counted on the host, while a velocity of nothing is walked."""
    counted = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda: counted.append(1 if len(x) == 1 else 2))
        return 0.1 * x

    cond = Conditioning(
        jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool), jnp.ones((1, 3)), jnp.zeros((1, 2, 2, 2, 1)),
        jnp.zeros((1, 2, 2, 2, 1)),
    )  # fmt: skip
    walked = guidance.guided(velocity, cond, scale)
    key = jax.random.key(0)
    samplers.sample(walked, cond, cond.known, timesteps.grid(3, 2.0), sampler=sampler, key=key)
    jax.effects_barrier()
    options = SamplingOptions(num_inference_steps=3, sampler=sampler, guidance_scale=scale)
    assert compare.evaluations(options, SimpleNamespace(guidance_embedding=False)) == sum(counted)


def test_a_network_that_is_told_the_scale_runs_once():
    options = SamplingOptions(num_inference_steps=3, sampler="euler", guidance_scale=6.0)
    assert compare.evaluations(options, SimpleNamespace(guidance_embedding=True)) == 3


class Fake:
    """A pipeline that takes 3 s of transformer a prompt, 100 s the first time, and 50 s of anything else."""

    def __init__(self, label, seconds):
        self.seconds, self.label, self.calls = seconds, label, 0

    def __call__(self, prompts, *, seed, image=None, num_inference_steps=1):
        self.calls += 1
        self.seconds[self.label] += (3 if self.calls > 1 else 100) * len(prompts)
        self.seconds["compile"] += 50
        images = np.zeros((len(prompts), 2, 2, 3)) + np.reshape(seed, (-1, 1, 1, 1)) if image is None else image
        frames = None if image is None else np.stack([images, images + np.reshape(seed, (-1, 1, 1, 1))], 1)
        return PipelineOutput(images=images, frames=frames)


def fake_pipeline():
    seconds = collections.Counter()
    parts = {"text_to_image": "image", "image_to_video": "video", "from_text": "video"}
    calls = {name: Fake(label, seconds) for name, label in parts.items()}
    return SimpleNamespace(engine=SimpleNamespace(seconds=seconds), **calls)


@pytest.mark.parametrize("count", [3, 20])
def test_samples_and_seconds(count):
    both = fake_pipeline()
    true = np.full((count, 2, 2, 2, 3), 0.5)
    clips = protocol.Clips((), tuple(f"caption {i}" for i in range(count)), {"truth": true, "posters": true})
    noises = np.arange(2 * count).reshape(2, count) + 1
    made = compare.make(Loaded(Row("a", "x", {"num_inference_steps": 2}), both, None), clips, noises)
    varied = min(count, protocol.BATCH)
    assert made.seconds == {"i2v": 3, "t2v": 6}
    np.testing.assert_array_equal(made.clips["i2v"][:, 1, 0, 0, 0], 0.5 + noises[0])
    np.testing.assert_array_equal(made.clips["t2v"][:, :, 0, 0, 0], np.stack([noises[0], 2 * noises[0]], 1))
    np.testing.assert_array_equal(np.stack(made.draws["i2v"])[:, :, 1, 0, 0, 0], 0.5 + noises[:, :varied])
    np.testing.assert_array_equal(np.stack(made.draws["t2v"])[..., 0, 0, 0, 0], noises[:, :varied])
    held_out = protocol.Clips((), clips.captions, {"truth": true})
    assert set(compare.make(Loaded(Row("a", "x", {}), both, None), held_out, noises).clips) == {"i2v"}


def test_clips_of_text_alone(pipeline, pack):
    """They are those of `from_text`; held-out subjects, which can't be named, have none."""
    loaded = Loaded(Row("a", "x", {}), pipeline, resolve({}, pipeline.components))
    clips = protocol.true_clips(pack, "train", 2, side=32, num_frames=9)
    noises = compare.noise_seeds(0, "train", 2, draws=2)
    made = compare.make(loaded, clips, noises, kinds=("text",))
    whole = pipeline.from_text(list(clips.captions), seed=tuple(map(int, noises[0])))
    np.testing.assert_allclose(made.clips["text"], whole.frames, atol=1e-6)
    np.testing.assert_array_equal(whole.images, whole.frames[:, 0])
    np.testing.assert_array_equal(made.draws["text"][0], made.clips["text"])
    assert np.abs(made.draws["text"][0] - made.draws["text"][1]).max() > 0.01 and made.seconds["text"] > 0
    held_out = dataclasses.replace(clips, made={"truth": clips.made["truth"]})
    assert compare.make(loaded, held_out, noises, kinds=("text",)) == Made({}, {}, {})


def test_text_to_video_by_halves_is_text_to_video(pipeline, pack):
    row = Row("a", "x", {"num_inference_steps": 1})
    clips = protocol.true_clips(pack, "train", 2, side=32, num_frames=9)
    noises = compare.noise_seeds(0, "train", 2, draws=2)
    made = compare.make(Loaded(row, pipeline, resolve(row.options, pipeline.components)), clips, noises)
    seed = tuple(map(int, noises[0]))
    whole = pipeline(list(clips.captions), seed=seed, num_inference_steps=1)
    np.testing.assert_allclose(made.clips["t2v"], whole.frames, atol=1e-6)
    np.testing.assert_allclose(made.draws["t2v"][0][:, 0], whole.images, atol=1e-6)
    assert made.seconds["t2v"] > made.seconds["i2v"] > 0
    assert np.abs(made.draws["i2v"][0] - made.draws["i2v"][1]).max() > 0.01


def test_true_clips_have_the_best_values(pack, search, moving):
    scenes = tuple(moving[::5])
    true = protocol.render_clips(pack, scenes, side=64, num_frames=17)
    posters = protocol.render_clips(pack, [dataclasses.replace(s, size=40.0) for s in scenes], side=64, num_frames=17)
    clips = protocol.Clips(scenes, ("",) * len(scenes), {"truth": true, "posters": posters})
    judge = compare.Judge(search, FeatureSpace.of(true))
    made = Made({"i2v": true, "t2v": posters}, {"i2v": [true, true], "t2v": [posters, true]}, {"i2v": 1.0, "t2v": 3.0})
    options = SamplingOptions(num_inference_steps=4, sampler="euler", guidance_scale=1.0)
    config = SimpleNamespace(guidance_embedding=False)
    found = compare.measure(made, clips, judge, resolved=options, config=config)
    for kind in ("i2v", "t2v"):
        best = {"last_identity": 1, "last_nearest": 1, "last_colour": 1, "motion": 1, "motion_amount": 1, "frechet": 0}
        assert {k: found[kind][k] for k in best} == pytest.approx(best, abs=1e-6)
        for measure, each in found[kind][standing.BY_CAPTION].items():
            assert len(each) == len(scenes) and np.mean(each) == pytest.approx(found[kind][measure], rel=1e-4, abs=1e-9)
    assert (found["t2v"]["first_identity"], found["t2v"]["first_nearest"]) == (1, 1)
    assert found["i2v"]["first_frame_psnr"] == metrics.PSNR_CEILING
    assert (found["i2v"]["diversity"], found["t2v"]["diversity"] > 0) == (0, True)
    assert [(found[k]["evaluations"], found[k]["dit_seconds"]) for k in ("i2v", "t2v")] == [(4, 1), (8, 3)]


def test_rows_of_one_folder_share_a_pipeline(weights_folder, monkeypatch):
    monkeypatch.chdir(weights_folder.parent)
    rows = (Row("a", str(weights_folder), {"guidance_scale": 2.0}), Row("b", weights_folder.name, {}))
    first, second = compare.load_rows(rows)
    assert first.pipeline is second.pipeline
    assert (first.resolved.guidance_scale, second.resolved.guidance_scale) == (2, 1)


def test_megabytes_are_those_of_the_forms_that_kernels_are_held_in(weights_folder, tmp_path):
    small = tmp_path / "small"
    assert quantize.main([str(weights_folder), str(small), "--no_calibration", "--others", "as_is"]) == 0
    dense, held = compare.load_rows(compare.read_rows([f"dense={weights_folder}", f"small={small}"]))
    params = jax.tree.leaves(held.pipeline.components.transformer.params)
    assert compare.megabytes(held) == sum(leaf.nbytes for leaf in params) / 1e6 < compare.megabytes(dense)


def test_adapters_and_other_transformers_are_part_of_a_row(weights_folder, tmp_path):
    """An adapter of one kernel and a transformer in which that kernel is changed as much are the same network."""
    network, params = load_model(weights_folder / "transformer")
    kernel = flatten(params)["patch_out.kernel"]
    a, b = np.ones((kernel.shape[0], 1), np.float32), np.linspace(0, 0.1, kernel.shape[1], dtype=np.float32)[None]
    adapter = unflatten({"patch_out.a": a, "patch_out.b": b, "patch_out.scale": np.ones(1, np.float32)})
    lora.save(tmp_path / "a.safetensors", adapter, hunyuan_dit.table(network.config), network.abstract_params)
    changed = unflatten({**flatten(params), "patch_out.kernel": kernel + a @ b})
    weights.save(tmp_path / "t", {"model": "mmdit", **settings.to_dict(network.config)}, changed)
    rows = (
        Row("plain", str(weights_folder), {"guidance_scale": 2.0}),
        Row("adapter", str(weights_folder), {}, lora=str(tmp_path / "a.safetensors")),
        Row("other", str(weights_folder), {}, transformer=str(tmp_path / "t")),
        Row("same", str(weights_folder), {"num_inference_steps": 1}, transformer=str(tmp_path / "t")),
    )
    plain, adapted, other, same = compare.load_rows(rows)
    assert other.pipeline is same.pipeline and plain.pipeline is not other.pipeline
    kernels = [flatten(x.pipeline.components.transformer.params)["patch_out.kernel"] for x in (adapted, other)]
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-6)
    assert np.abs(kernels[0] - kernel).max() > 0.01

    found = [compare.identity(x) for x in (plain, adapted, other, same)]
    assert [set(f["digests"]) for f in found] == [{"folder"}, {"folder", "lora"}, *[{"folder", "transformer"}] * 2]
    assert found[2]["digests"] == found[3]["digests"] and len({str(f["digests"]) for f in found}) == 3
    assert found[0]["options"] == {"guidance_scale": 2.0} and found[0]["settings"]["num_inference_steps"] == 2
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("b", "missing/weights/here", {}), "no weights folder missing/weights/here"),
        (Row("b", "", {}, lora="missing.safetensors"), "row b: can't read missing.safetensors"),
        (Row("b", "", {}, transformer="missing/transformer"), "row b: no file missing/transformer/config.json"),
        (Row("b", "", {"num_inference_steps": 0}), "row b: num_inference_steps is 0"),
        (Row("b", "", {"sampler": "oiler"}), "row b: options.sampler is 'oiler'. Did you mean 'euler'"),
    ],
)
def test_rows_that_can_not_be_loaded(row, message, weights_folder):
    rows = (Row("a", str(weights_folder), {}), dataclasses.replace(row, weights=row.weights or str(weights_folder)))
    with pytest.raises(UserError, match=message):
        compare.load_rows(rows)


def test_rows_of_another_shape(weights_folder, tmp_path):
    other = shutil.copytree(weights_folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    index["sampling"]["num_frames"] = 5
    (other / "model_index.json").write_text(json.dumps(index))
    rows = (Row("a", str(weights_folder), {}), Row("b", str(other), {}))
    with pytest.raises(UserError, match=r"row b makes clips of .*\(5, 32, 32\) and row a of \(9, 32, 32\).*one shape"):
        compare.load_rows(rows)


def test_progress_is_told_as_often_as_announced():
    assert compare.progress_steps((Row("a", "x", {}),) * 3, Plan(seeds=(0, 1), splits=("train",))) == 12
