"""The sliding window: lengths, seams, streaming, one program for all windows, prompts by time, remedies."""

import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.models import lora
from magic141_jax.models.resident import Room
from magic141_jax.pipelines import TextToVideoPipeline
from magic141_jax.pipelines.components import load_components, load_model
from magic141_jax.pipelines.long_video import VideoStream, count_windows, make_plan, overlap_frames, stream_video
from magic141_jax.pipelines.options import resolve
from magic141_jax.pipelines.window import Plan
from magic141_jax.pytree import flatten, unflatten

PROMPT = "a red shark moves left"


@pytest.mark.parametrize("total", [1, 8, 9, 10, 17, 18, 40])
@pytest.mark.parametrize("overlap", [1, 2])
def test_length(pipeline, total, overlap):
    parts = list(stream_video(pipeline, PROMPT, total_frames=total, overlap_latents=overlap))
    assert sum(map(len, parts)) == total
    assert len(parts) == count_windows(total, 9, 4 * (overlap - 1) + 1)
    assert all(len(p) for p in parts)


def test_one_window_is_the_short_video(pipeline):
    short = pipeline(PROMPT, seed=7)
    stream = stream_video(pipeline, PROMPT, total_frames=25, seed=7)
    np.testing.assert_array_equal(stream.image, short.images[0])
    np.testing.assert_allclose(next(stream.frames), short.frames[0], atol=1e-5)


def test_a_longer_video_begins_like_a_shorter_one(pipeline):
    longer, shorter = (np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=n, seed=7))) for n in (30, 20))
    np.testing.assert_array_equal(longer[:20], shorter)


def test_windows_have_their_own_noise_and_share_programs(pipeline):
    list(stream_video(pipeline, PROMPT, total_frames=20, seed=1))
    pipeline.engine.seconds.clear()
    frames = np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=41, seed=1)))
    assert pipeline.engine.seconds["compile"] == 0
    assert set(pipeline.engine.seconds) >= {"text", "image", "video", "decode"}
    windows = frames[1:].reshape(5, 8, 32, 32, 3)
    assert all(np.abs(windows[i] - windows[i + 1]).max() > 1e-3 for i in range(4))


def stages(pipeline, monkeypatch):
    """Makes every window by the engine's stages, as where parameters come and go; returns the walks denoised."""
    engine, walks = pipeline.engine, []
    denoise = engine._denoise

    def spy(label, walk, **static):
        walks.append(walk)
        return denoise(label, walk, **static)

    monkeypatch.setattr(engine, "_window", None)
    monkeypatch.setattr(engine, "_denoise", spy)
    return walks


def whole(pipeline, total_frames, **options):
    return np.concatenate(list(stream_video(pipeline, PROMPT, total_frames=total_frames, **options)))


@pytest.mark.parametrize(
    "options",
    [
        {"overlap_latents": 2, "history_noise": 0.3, "match_colors": 0.5, "blend": True},
        {"overlap_latents": 2, "carry": "latents", "anchor": False, "guidance_scale": 2.0},
        {"overlap_latents": 2, "carry": "picture", "blend": True},
    ],
    ids=str,
)
def test_one_program_makes_what_the_stages_make(pipeline, monkeypatch, options):
    fused = whole(pipeline, 18, **options)
    walks = stages(pipeline, monkeypatch)
    np.testing.assert_allclose(fused, whole(pipeline, 18, **options), atol=5e-4)
    assert len(walks) == 1 + count_windows(18, 9, 5)


def test_the_known_frames_of_a_window_are_the_last_ones_encoded_anew(pipeline, monkeypatch):
    walks = stages(pipeline, monkeypatch)
    frames = whole(pipeline, 13, overlap_latents=2, history_noise=0.3)
    _, first, second = walks
    options = resolve({"overlap_latents": 2}, pipeline.components)
    assert overlap_frames(options, 4) == 5
    known, mask = pipeline.engine.encode_known(frames[None, 4:9], options, label="video")
    np.testing.assert_allclose(second.cond.known, known, atol=1e-5)
    np.testing.assert_array_equal(second.cond.mask, mask)
    assert np.asarray(first.cond.mask)[0, :, 0, 0, 0].tolist() == [1, 0, 0]
    assert np.asarray(second.cond.mask)[0, :, 0, 0, 0].tolist() == [1, 1, 0]
    np.testing.assert_array_equal(first.cond.text, second.cond.text)
    assert (float(first.history_noise), float(second.history_noise)) == (0.0, np.float32(0.3))


def test_the_next_window_is_started_before_frames_are_fetched(pipeline, monkeypatch):
    engine, seen = pipeline.engine, []

    def watched(name):
        act = getattr(engine, name)
        monkeypatch.setattr(engine, name, lambda *args, **kwargs: seen.append(name) or act(*args, **kwargs))

    watched("next_window")
    watched("fetch")
    start, fetch = "next_window", "fetch"
    stream = stream_video(pipeline, PROMPT, total_frames=25)
    assert seen == []
    next(stream.frames)
    assert seen == [start, start, fetch]
    list(stream)
    assert seen == [start, start, fetch, start, fetch, fetch]
    seen.clear()
    monkeypatch.setattr(engine, "_window", None)
    list(stream_video(pipeline, PROMPT, total_frames=25))
    assert seen == [start, fetch] * 3, "where parameters come and go, nothing runs ahead"


def test_all_windows_share_a_program_and_memory_does_not_grow(pipeline, recwarn):
    engine = pipeline.engine
    list(stream_video(pipeline, PROMPT, total_frames=9))
    programs, held = len(engine._window._programs), []
    for _ in stream_video(pipeline, PROMPT, total_frames=9 + 8 * 6, history_noise=0.7):
        gc.collect()
        held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert len(engine._window._programs) == programs
    assert len(set(held[:-1])) == 1 and held[-1] < held[0]
    assert not [w for w in recwarn if "donated" in str(w.message)]


def test_a_schedule_changes_the_prompt_of_later_windows(pipeline):
    plain = whole(pipeline, 25)
    story = whole(pipeline, 25, schedule=[(9 / 8, "a blue cat")])
    np.testing.assert_array_equal(story[:9], plain[:9])
    assert np.abs(story[9:17] - plain[9:17]).max() > 1e-3
    alone = stream_video(pipeline, total_frames=25, schedule=[(0, PROMPT), (9 / 8, "a blue cat")])
    np.testing.assert_array_equal(np.concatenate(list(alone)), story)


def test_what_is_said_holds_from_the_next_window_that_is_not_started(pipeline, monkeypatch):
    plain, asked = whole(pipeline, 33), []
    encode = pipeline.engine.encode_text

    def spy(prompts, *args, **kwargs):
        asked.extend(prompts)
        return encode(prompts, *args, **kwargs)

    monkeypatch.setattr(pipeline.engine, "encode_text", spy)
    stream = stream_video(pipeline, PROMPT, total_frames=33)
    parts = [next(stream.frames)]
    assert stream.say("a blue cat") == 17 / 8, "window 1 is under way"
    parts.append(next(stream.frames))
    assert stream.say(PROMPT) == 25 / 8
    parts += [*stream.frames]
    assert stream.say("a cat") is None
    assert asked == [PROMPT, "a blue cat"], "each prompt is encoded once"
    said = np.concatenate(parts)
    np.testing.assert_array_equal(said[:17], plain[:17])
    assert np.abs(said[17:] - plain[17:]).max() > 1e-3
    assert VideoStream(plain[0], iter([])).say(PROMPT) is None


def test_options_become_a_plan(pipeline):
    def plan(components=pipeline.components, **options):
        return make_plan(resolve({"overlap_latents": 2, **options}, components), components)

    plain = Plan(length=9, overlap=5)
    assert plan() == plain
    asked = {"blend": True, "anchor": False, "match_colors": 0.5}
    assert plan(carry="latents", **asked) == dataclasses.replace(plain, carried=1, **asked)
    assert plan(carry="sink") == dataclasses.replace(plain, carried=1, sink=True)
    assert plan(carry="picture") == dataclasses.replace(plain, follow=True)
    made_for = dataclasses.replace(pipeline.components.sampling, carry="picture", blend=True)
    asking = dataclasses.replace(pipeline.components, sampling=made_for)
    assert plan(asking) == dataclasses.replace(plain, follow=True, blend=True), "as the weights ask for it"
    assert plan(asking, carry="pixels", blend=False) == plain
    sharing = dataclasses.replace(asking, sampling=dataclasses.replace(made_for, overlap_latents=2))
    for frames, shared in ((9, 5), (5, 1), (1, 1)):
        assert make_plan(resolve({"num_frames": frames}, sharing), sharing).shared == shared, "less than the window"


def test_bad_calls(pipeline):
    for kwargs, message in (
        ({"total_frames": 0}, "at least 1"),
        ({"total_frames": 9, "latents": np.zeros(3)}, "its own noise"),
        ({"total_frames": 9, "image": "nowhere.png"}, "no image file"),
    ):
        with pytest.raises(UserError, match=message):
            stream_video(pipeline, PROMPT, **kwargs)
    with pytest.raises(UserError, match="go on"):
        stream_video(pipeline, PROMPT, total_frames=2, num_frames=1)
    with pytest.warns(UserWarning, match="line 1 .* ends at 1 s"):
        stream_video(pipeline, PROMPT, total_frames=8, schedule=[(5, "a cat")])
    with pytest.raises(UserError, match="prompt"):
        stream_video(pipeline, [PROMPT, PROMPT], total_frames=9)


@pytest.fixture(scope="module")
def continued_folder(weights_folder, tmp_path_factory):
    """The tiny weights with a random adapter for all windows but the first."""
    made = tmp_path_factory.mktemp("continued") / "tiny"
    shutil.copytree(weights_folder, made)
    network = load_model(made / "transformer").network
    adapter = flatten(lora.fresh(lora.adapted(network, 2, paths="qkv|mlp"), jax.random.key(0)))
    rng = np.random.default_rng(0)
    random = {path: np.float32(rng.normal(0, 0.3, np.shape(leaf))) for path, leaf in adapter.items()}
    fields = {"model": "continuation", "rank": 2, "paths": "qkv|mlp", "overlap_latents": 2, "history_noise": 0.25}
    weights.save(made / "continuation", fields, unflatten(random), storage="int8")
    return made


def test_the_adapter_makes_all_windows_but_the_first(pipeline, continued_folder, monkeypatch):
    continued = TextToVideoPipeline.from_pretrained(continued_folder)
    asked = {"carry": "sink", "overlap_latents": 2, "history_noise": 0.25}
    made = whole(continued, 17, seed=3)
    np.testing.assert_array_equal(whole(continued, 17, seed=3, **asked), made, err_msg="the adapter's own settings")
    plain = whole(pipeline, 17, seed=3, **asked)
    np.testing.assert_allclose(made[:9], plain[:9], atol=1e-4, err_msg="window 0 is the transformer's own")
    assert np.abs(made[9:] - plain[9:]).max() > 1e-3
    other = {"carry": "latents", "overlap_latents": 2}
    np.testing.assert_allclose(whole(continued, 17, seed=3, **other), whole(pipeline, 17, seed=3, **other), atol=1e-4)
    monkeypatch.setattr(continued.engine, "_window", None)
    np.testing.assert_allclose(whole(continued, 17, seed=3), made, atol=5e-4, err_msg="stage by stage")


def test_an_adapter_where_parameters_come_and_go(continued_folder):
    made = whole(TextToVideoPipeline.from_pretrained(continued_folder), 14, seed=3)
    for in_parts in (False, True):
        lent = TextToVideoPipeline.from_pretrained(continued_folder, offload=Room(on_host=in_parts))
        np.testing.assert_allclose(whole(lent, 14, seed=3), made, atol=5e-4)


def test_an_adapter_of_another_transformer_is_told(continued_folder, tmp_path):
    shutil.copytree(continued_folder, tmp_path / "other")
    config, adapter = weights.load(continued_folder / "continuation")
    wrong = {path: np.asarray(leaf)[..., :-1, :] for path, leaf in flatten(adapter).items()}
    weights.save(tmp_path / "other" / "continuation", config, unflatten(wrong))
    with pytest.raises(UserError, match="for another transformer"):
        TextToVideoPipeline.from_pretrained(tmp_path / "other")


def test_an_adapter_is_of_one_transformer(continued_folder, tmp_path):
    """A folder that has a transformer of its own does not borrow its base's adapter; one that has none does."""
    shutil.copytree(continued_folder, tmp_path / "base")
    index = {**weights.read_json(continued_folder / "model_index.json"), "base": "base"}
    for name, own in (("student", True), ("tuned", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        if own:
            shutil.copytree(continued_folder / "transformer", tmp_path / name / "transformer")
    assert load_components(tmp_path / "student").continuation is None
    assert load_components(tmp_path / "tuned").continuation is not None
    assert load_components(continued_folder, transformer=continued_folder / "transformer").continuation is None
