"""A walk over shapes against a real one: the same programs, as often, over as many bytes."""

import functools

import jax
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.aot import dry
from magic141_jax.errors import UserError
from magic141_jax.pipelines.components import load_components
from magic141_jax.pipelines.engine import Engine, Stage
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import flatten

TOLD = {"total_frames": 20, "seed": 0}  # windows of 9 frames, 1 of them shared: 3 of them
STORY = {"schedule": [(1.5, "a blue cat")]}


def walk(weights_folder, told=TOLD, **options):
    book = dry.Book()
    pipeline = dry.pipeline(book, weights_folder, **options)
    frames = list(stream_video(pipeline, "a red shark", **told))
    return book, np.concatenate(frames)


@pytest.mark.parametrize("options", [{}, {"offload": True}])
def test_the_programs_are_those_of_a_real_call(weights_folder, options):
    calls = []

    class Counting(Stage):
        def __call__(self, label, *arrays, **static):
            calls.append((label, id(self)))
            made = super().__call__(label, *arrays, **static)
            compiled[id(self)] = len(self._programs)
            return made

    compiled = {}
    real = TextToVideoPipeline(Engine(load_components(weights_folder, **options), stage=Counting))
    frames = np.concatenate(list(stream_video(real, "a red shark", **TOLD, **STORY)))
    book, zeros = walk(weights_folder, told=TOLD | STORY, **options)
    assert zeros.shape == frames.shape == (20, 32, 32, 3) and not zeros.any()
    found = [each for each in book.programs.values() if each.label != "text"]
    assert len(found) == sum(compiled.values())
    assert sum(each.calls for each in found) == len(calls)
    assert sum(each.calls for each in book.programs.values() if each.label == "text") >= 2  # both prompts


def test_parameters_are_those_that_are_read(weights_folder, pipeline):
    book, _ = walk(weights_folder)
    components = pipeline.components
    for name, params in (
        ("mmdit", components.transformer.params),
        ("patch_vae", components.vae.params),
        ("image_encoder", components.image_encoder.params),
        ("bert", components.text_encoder.params),
    ):
        leaves = flatten(params).values()
        assert book.parts[name].size == sum(leaf.nbytes for leaf in leaves)
        assert book.parts[name].count == sum(leaf.size for leaf in leaves)
    halved, _ = walk(weights_folder, dtype="bfloat16")
    assert halved.parts["mmdit"].size == book.parts["mmdit"].size // 2
    assert halved.parts["bert"] == book.parts["bert"]


def test_operations_go_with_steps_and_length(weights_folder):
    one, two = (walk(weights_folder, told=TOLD | {"num_inference_steps": n})[0].operations for n in (10, 20))
    assert 1.7 < two / one < 2
    short, long = (walk(weights_folder, told=TOLD | {"total_frames": n})[0] for n in (9, 89))
    video = [sum(f.calls * f.operations for f in b.programs.values() if f.label == "video") for b in (short, long)]
    assert video[1] == pytest.approx(11 * video[0])  # windows


def test_over_a_mesh(weights_folder):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4), devices=jax.devices()[:4])
    book, _ = walk(weights_folder, mesh=mesh, told={"total_frames": 1, "seed": 0})
    alone, _ = walk(weights_folder)
    assert book.parts["bert"].size <= alone.parts["bert"].size
    assert book.temporaries() > 0


def test_another_network_makes_the_image(weights_folder):
    book, _ = walk(weights_folder, image_weights=weights_folder)
    alone, _ = walk(weights_folder)
    assert {"mmdit", "mmdit 2", "bert 2"} <= set(book.parts)
    assert book.parts["mmdit 2"].size == book.parts["mmdit"].size == alone.parts["mmdit"].size


def test_nothing_is_downloaded(tmp_path):
    with pytest.raises(UserError, match=r"convert check owner/name"):
        dry.pipeline(dry.Book(), "owner/name")


def test_no_text_is_kept(weights_folder, tmp_path):
    walk(weights_folder, text_cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_parts", [False, True])
def test_what_comes_and_goes_is_told_as_a_room_has_it(weights_folder, pipeline, monkeypatch, in_parts):
    monkeypatch.setattr(dry, "Shapes", functools.partial(dry.Shapes, on_host=in_parts))
    book, _ = walk(weights_folder, offload=True, image_weights=weights_folder)
    assert len({part.room for part in book.parts.values()}) == len(book.parts) == 8
    transformer = sum(leaf.nbytes for leaf in jax.tree.leaves(pipeline.components.transformer.params))
    ((name, most),) = book.held.items()
    assert name == "mmdit" and most == book.parts["mmdit"].most
    assert most == transformer if not in_parts else 0.5 * transformer < most < 0.7 * transformer
    assert (book.parts["patch_vae"].most < book.parts["patch_vae"].size) is in_parts
    assert walk(weights_folder, image_weights=weights_folder)[0].held == {n: p.size for n, p in book.parts.items()}
