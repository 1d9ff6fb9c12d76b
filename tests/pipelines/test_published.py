"""Published pipeline folders: every step's latents and the frames are those of diffusers' pipelines; and misuse."""

import copy
import json
import shutil

import av
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sample
from magic141_jax.errors import UserError
from magic141_jax.models.resident import Room
from magic141_jax.pipelines import ImageToVideoPipeline, TextToImagePipeline, TextToVideoPipeline, stream_video
from magic141_jax.pipelines.components import load_components
from magic141_jax.pytree import flatten
from tests import published_pipelines
from tests.published_text import PROMPTS

SIZE = {"height": 32, "width": 48, "num_inference_steps": 3}
STEP_TOLERANCE, FRAME_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """variant, sizes -> (folder, diffusers' pipeline), made once each."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    made = {}

    def repository(variant, **sizes):
        key = (variant, *sorted(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("published") / variant
            made[key] = folder, published_pipelines.write(folder, variant, **sizes)
        return made[key]

    return repository


def noise(batch, frames):
    shape = (batch, frames, SIZE["height"] // 8, SIZE["width"] // 8, 16)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def picture():
    pixels = np.random.default_rng(2).integers(0, 256, (41, 77, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((154, 82), Image.Resampling.BICUBIC)


def run_theirs(pipeline, latents, **options):
    """Their frames (b, t, y, x, 3), and latents (b, f, h, w, c) after each step."""
    import torch

    steps = []

    def keep(pipe, step, time, state):
        steps.append(state["latents"].float().numpy().copy())
        return state

    with torch.no_grad():
        frames = pipeline(
            latents=torch.tensor(latents), output_type="pt", callback_on_step_end=keep, return_dict=False, **options
        )[0]
    return frames.float().numpy(), steps


def run_ours(pipeline, latents, prompt, **options):
    """Our frames and the latents after each step."""
    steps = {}
    made = pipeline(prompt, latents=latents, callback=lambda i, t, x: steps.update({int(i): np.asarray(x)}), **options)
    jax.effects_barrier()
    return made, [steps[i] for i in sorted(steps)]


def compare_steps(ours, theirs, first=0):
    assert len(ours) == len(theirs) == SIZE["num_inference_steps"]
    for have, want in zip(ours, theirs, strict=True):
        want = np.moveaxis(want, 1, -1)
        np.testing.assert_allclose(have[:, first:], want[:, first:], atol=STEP_TOLERANCE * max(1, abs(want).max()))


CASES = {
    "on channels": ("concat", {}, 9, 1.0),
    "in place": ("replace", {"layers": (2, 1), "heads": 3}, 5, 6.0),
    "deeper, frame tiles": ("concat", {"layers": (2, 3), "channels": (8, 16, 16, 16)}, 17, 1.0),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_image_to_video_is_diffusers(repositories, case):
    variant, sizes, frames, guidance = CASES[case]
    folder, theirs = repositories(variant, **sizes)
    latents = noise(1, (frames - 1) // 4 + 1)
    options = {**SIZE, "num_frames": frames, "guidance_scale": guidance}
    want, want_steps = run_theirs(theirs, np.moveaxis(latents, -1, 1), prompt=PROMPTS[0], image=picture(), **options)
    pipeline = ImageToVideoPipeline.from_pretrained(folder)
    made, steps = run_ours(pipeline, latents, PROMPTS[0], image=picture(), **options)
    compare_steps(steps, want_steps, first=variant == "replace")
    np.testing.assert_allclose(made.frames, np.moveaxis(want, 2, -1), atol=FRAME_TOLERANCE)


@pytest.mark.heavy
def test_true_guidance_of_image_to_video_is_diffusers(repositories):
    folder, theirs = repositories("concat")
    latents = noise(1, 2)
    options = {**SIZE, "num_frames": 5, "negative_prompt": PROMPTS[1]}
    _, want_steps = run_theirs(
        theirs, np.moveaxis(latents, -1, 1), prompt=PROMPTS[0], image=picture(), true_cfg_scale=3.0, **options
    )
    pipeline = ImageToVideoPipeline.from_pretrained(folder)
    options |= {"image": picture(), "guidance_scale": 3.0}
    compare_steps(run_ours(pipeline, latents, PROMPTS[0], **options)[1], want_steps)


@pytest.mark.heavy
def test_bfloat16_is_no_farther_off_than_diffusers_own(repositories):
    import torch

    folder, theirs = repositories("concat")
    latents, options = noise(1, 2), {**SIZE, "num_frames": 5}
    given = {"prompt": PROMPTS[0], "image": picture(), **options}
    exact = run_theirs(theirs, np.moveaxis(latents, -1, 1), **given)[1][-1]
    rough = run_theirs(copy.deepcopy(theirs).to(torch.bfloat16), np.moveaxis(latents, -1, 1), **given)[1][-1]
    pipeline = ImageToVideoPipeline.from_pretrained(folder, dtype="bfloat16")
    assert pipeline.components.transformer.params["patch_in"]["kernel"].dtype == jax.numpy.bfloat16
    ours = run_ours(pipeline, latents, PROMPTS[0], image=picture(), **options)[1][-1]

    def error(have):
        return np.sqrt(np.mean((have - exact) ** 2) / np.mean(exact**2))

    assert error(np.moveaxis(ours, -1, 1)) < min(0.02, 1.5 * error(rough))


@pytest.mark.heavy
def test_text_to_video_and_its_single_image_are_diffusers(repositories):
    folder, theirs = repositories("text")
    pipeline = TextToVideoPipeline.from_pretrained(folder)
    for frames, run in ((5, pipeline), (1, TextToImagePipeline(pipeline.engine))):
        latents = noise(2, (frames - 1) // 4 + 1)
        options = {**SIZE, "guidance_scale": 5.0}
        want, want_steps = run_theirs(
            theirs, np.moveaxis(latents, -1, 1), prompt=PROMPTS[:2], num_frames=frames, **options
        )
        made, steps = run_ours(run, latents, PROMPTS[:2], num_frames=frames, **options)
        compare_steps(steps, want_steps)
        have = made.frames if frames > 1 else made.images[:, None]
        np.testing.assert_allclose(have, np.moveaxis(want, 2, -1), atol=FRAME_TOLERANCE)


def pack(latents):
    """(b, 1, h, w, c) -> FLUX's tokens (b, h / 2 * w / 2, c * 4), channels first within a token."""
    b, _, h, w, c = latents.shape
    tokens = latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    return tokens.reshape(b, h * w // 4, c * 4)


@pytest.mark.heavy
def test_flux_is_diffusers(repositories):
    folder, theirs = repositories("flux")
    latents, options = noise(2, 1), {**SIZE, "guidance_scale": 3.5}
    want, want_steps = run_theirs(theirs, pack(latents), prompt=PROMPTS[:2], **options)
    made, steps = run_ours(TextToImagePipeline.from_pretrained(folder), latents, PROMPTS[:2], **options)
    for have, expected in zip(steps, want_steps, strict=True):
        np.testing.assert_allclose(pack(have), expected, atol=STEP_TOLERANCE * abs(expected).max())
    np.testing.assert_allclose(made.images, np.moveaxis(want, 1, -1), atol=FRAME_TOLERANCE)


@pytest.mark.heavy
def test_an_image_of_one_repository_is_animated_by_another(repositories):
    videos, images = repositories("concat")[0], repositories("flux")[0]
    pipeline = TextToVideoPipeline.from_pretrained(videos, image_weights=images)
    options = {**SIZE, "num_frames": 5}
    made = pipeline(PROMPTS[0], **options)
    alone = pipeline.text_to_image(PROMPTS[0], height=32, width=48)
    np.testing.assert_allclose(made.images, alone.images, atol=1e-6)
    animated = pipeline.image_to_video(PROMPTS[0], image=made.images[0], **options)
    np.testing.assert_allclose(made.frames, animated.frames, atol=1e-4)
    assert made.frames.shape == (1, 1, 32, 48, 3), "the first 4 of 5 frames are dropped"
    stream = stream_video(pipeline, PROMPTS[0], image=picture(), total_frames=3, **options)
    assert [len(frames) for frames in stream] == [1, 1, 1]


@pytest.mark.heavy
def test_short_of_memory_the_videos_are_the_same(repositories, tmp_path):
    videos, images = repositories("concat")[0], repositories("flux")[0]
    saving = {"offload": True, "text_cache": tmp_path / "cache", "vae_tiles": 64}
    made = [
        TextToVideoPipeline.from_pretrained(videos, image_weights=images, **memory)(PROMPTS[0], **SIZE, num_frames=5)
        for memory in ({}, saving)
    ]
    np.testing.assert_array_equal(made[0].frames, made[1].frames)
    kinds = [path.suffix for path in (tmp_path / "cache").iterdir()]
    assert sorted(kinds) == [".digest", ".digest", ".safetensors", ".safetensors"], "FLUX's prompt, and LLaVA's"


def test_a_lora_is_merged_on_loading(repositories, tmp_path):
    folder = repositories("text")[0]
    plain = TextToVideoPipeline.from_pretrained(folder)
    network, params = plain.components.transformer
    name, rng = "transformer_blocks.0.attn.to_v", np.random.default_rng(0)
    a, b = rng.normal(size=(2, network.config.width)), rng.normal(size=(network.config.width, 2))
    tensors = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    file = tmp_path / "lora.safetensors"
    save_file({key: value.astype(np.float32) for key, value in tensors.items()}, file)
    merged, lent = (
        load_components(folder, lora=file, lora_scale=0.5, offload=offload).transformer.params
        for offload in (False, Room(on_host=True))
    )
    jax.tree.map(np.testing.assert_array_equal, lent(), merged)
    changed = [path for path, leaf in flatten(merged).items() if not np.array_equal(leaf, flatten(params)[path])]
    assert changed == ["double_blocks.video.qkv.kernel"]
    config, path = network.config, changed[0]
    shape = (config.width, config.heads, 3, config.head_width)
    added = np.asarray(flatten(merged)[path][0] - flatten(params)[path][0]).reshape(shape)
    np.testing.assert_allclose(added[:, :, 2].reshape(config.width, -1), 0.5 * (b @ a).T, atol=1e-5)
    assert not added[:, :, :2].any()
    with pytest.raises(UserError, match="no linear layer is called nonsense"):
        save_file({"transformer.nonsense.lora_A.weight": a, "transformer.nonsense.lora_B.weight": b}, file)
        TextToVideoPipeline.from_pretrained(folder, lora=file)


@pytest.mark.heavy
def test_the_command_line_animates_a_picture_with_published_weights(repositories, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out.mp4"
    picture().save(photo)
    flags = ["--prompt", PROMPTS[0], "--image", str(photo), "--size", "48x32", "--num_frames", "9", "--steps", "2"]
    assert (
        sample.main([*flags, "--weights", str(repositories("concat")[0]), "--mesh", "fsdp=2", "--output", str(out)])
        == 0
    )
    about = json.loads(out.with_suffix(".json").read_text())
    assert (about["frames"], about["upscale"]) == (5, 5)
    with av.open(str(out)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (160, 240, 3)


def test_weights_say_what_they_cannot_do(repositories):
    pipeline = TextToVideoPipeline.from_pretrained(repositories("concat")[0])
    with pytest.raises(UserError, match="animate a picture"):
        pipeline(PROMPTS[0], **SIZE, num_frames=5)
    with pytest.raises(UserError, match="picture"):
        TextToImagePipeline(pipeline.engine)(PROMPTS[0], **SIZE)
    texts = TextToVideoPipeline.from_pretrained(repositories("text")[0])
    with pytest.raises(UserError, match="text alone"):
        stream_video(texts, PROMPTS[0], image=picture(), total_frames=9, **SIZE, num_frames=5)
    with pytest.raises(UserError, match="no first image"):
        ImageToVideoPipeline(texts.engine)(PROMPTS[0], image=picture(), **SIZE, num_frames=5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index.json", {"_class_name": "HunyuanVideoPipelin"}, "Did you mean 'HunyuanVideoPipeline'"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas"),
        ("transformer/config.json", {"num_layers": 7}, "transformer"),
        ("scheduler/scheduler_config.json", None, "scheduler_config.json"),
        ("tokenizer/tokenizer.json", None, "tokenizer.json"),
    ],
)
def test_a_damaged_folder_is_named(repositories, tmp_path, file, change, message):
    folder = tmp_path / "damaged"
    shutil.copytree(repositories("text")[0], folder)
    if change is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        TextToVideoPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)
