"""CLIP's inputs against transformers: odd prompts, odd pictures, cut prompts; and files that are missing or unfit."""

import json

import numpy as np
import pytest
from PIL import Image

from magic141_jax.convert import clip as convert
from magic141_jax.errors import UserError
from magic141_jax.models.clip import ClipText
from magic141_jax.models.clip_inputs import (
    END,
    START,
    ClipPooler,
    ImageProcessor,
    read_clip_tokenizer,
    read_image_processor,
)
from magic141_jax.models.network import Network
from tests.published_text import PROMPTS, clip_files, clip_text_sizes, draw

ODD = ["", "  A  SMALL\n\tRed Boat's lake ", "Ünïcode — 湖, 42nd!!", f"a {END} b", "I'LL they're 3.14", "x" * 50]
PUBLISHED = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with vocab.json and merges.txt, and what these hold."""
    path = tmp_path_factory.mktemp("clip")
    return path, *clip_files(path)


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_tokens_are_those_of_transformers(folder, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    path, vocabulary, merges = folder
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    if kind == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        assert not (tmp_path / "vocab.json").exists()
        path = tmp_path
    tokenizer = read_clip_tokenizer(path)
    wanted = [theirs(prompt).input_ids for prompt in ODD + PROMPTS]
    assert [tokenizer.encode(prompt).ids for prompt in ODD + PROMPTS] == wanted


@pytest.mark.parametrize(
    "shapes", [[(97, 161), (400, 351), (336, 336)], [(1, 40), (1000, 337), (335, 336)]], ids=["usual", "extreme"]
)
def test_pictures_are_those_of_transformers(shapes):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = processors.CLIPImageProcessorPil(**{k: v for k, v in PUBLISHED.items() if k != "image_processor_type"})
    pictures = [Image.fromarray(picture(*shape, 3)) for shape in shapes]
    wanted = np.moveaxis(np.stack(theirs(pictures, return_tensors="np").pixel_values), 1, -1)
    np.testing.assert_allclose(ImageProcessor()(pictures), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK"])
def test_every_kind_of_picture_becomes_the_same_as_there(mode):
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    image = Image.fromarray(picture(50, 70, 4), "RGBA").convert(mode)
    theirs = processors.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    wanted = np.moveaxis(theirs(image, return_tensors="np").pixel_values[0], 0, -1)
    np.testing.assert_allclose(ImageProcessor(20, 20)([image])[0], wanted, rtol=1e-6, atol=1e-6)


def test_arrays_are_read_like_pictures():
    values = picture(40, 60, 3)
    wanted = ImageProcessor(28, 28)([Image.fromarray(values)])
    np.testing.assert_array_equal(ImageProcessor(28, 28)([values]), wanted)
    np.testing.assert_array_equal(ImageProcessor(28, 28)([values.astype(np.float32) / 255]), wanted)


def test_crop_is_the_centre_of_the_longer_side():
    values = np.zeros((30, 90, 3), np.uint8)
    values[:, 30:60] = 255
    out = ImageProcessor(30, 30, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))([values])
    assert out.shape == (1, 30, 30, 3) and out.min() == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4)), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 4)), r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3)), r"shape \(0, 4, 3\)"),
        (np.full((4, 4, 3), 255.0), "from 255.0 to 255.0"),
        (np.full((4, 4, 3), np.nan), "from nan"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(image, message):
    with pytest.raises(UserError, match=message):
        ImageProcessor()([image])


def write(folder, **changes):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(PUBLISHED | changes))
    return file


def test_processor_of_a_folder(tmp_path):
    assert read_image_processor(write(tmp_path)) == ImageProcessor()
    old = read_image_processor(write(tmp_path, size=30, crop_size=28, image_std=[1, 2, 3]))
    assert (old.size, old.crop, old.std) == (30, 28, (1, 2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"resample": 2},
        {"rescale_factor": 1},
        {"size": {"height": 3, "width": 3}},
        {"crop_size": {"height": 3, "width": 4}},
        {"image_mean": [1, 2]},
    ],
)
def test_another_kind_of_processor_is_refused(tmp_path, change):
    with pytest.raises(UserError, match=next(iter(change))):
        read_image_processor(write(tmp_path, **change))
    with pytest.raises(UserError, match=r"1\.\.300"):
        read_image_processor(write(tmp_path, size=300))
    with pytest.raises(UserError, match="no file"):
        read_image_processor(tmp_path / "nothing.json")


def test_tokenizers_that_are_missing_or_damaged_are_refused(folder, tmp_path):
    path, vocabulary, _ = folder
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
        read_clip_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text((path / "vocab.json").read_text()[:100])
    with pytest.raises(UserError, match=r"nor merges\.txt"):
        read_clip_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text((path / "merges.txt").read_text())
    with pytest.raises(UserError, match="copy them again"):
        read_clip_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if k != START}))
    with pytest.raises(UserError, match=r"has no <\|startoftext\|>"):
        read_clip_tokenizer(tmp_path)


def make_pooler(folder, **sizes):
    network = Network.create(ClipText, convert.text_config_to_ours(clip_text_sizes(layers=1) | sizes))
    return ClipPooler(network, draw(network), read_clip_tokenizer(folder))


def test_pooled_vectors_do_not_depend_on_batch_mates_and_cut_prompts_are_told(folder):
    pooler = make_pooler(folder[0], max_position_embeddings=12)
    together = np.asarray(pooler(PROMPTS))
    assert together.shape == (3, 24)
    np.testing.assert_allclose(together[1:2], pooler(PROMPTS[1:2]), rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1
    with pytest.warns(UserWarning, match=r"CLIP's 12 tokens.*dropped: 'lake lake'"):
        cut = pooler(["lake " * 12])
    np.testing.assert_allclose(cut, pooler(["lake " * 10]), rtol=1e-5, atol=1e-6)


def test_a_pooler_of_unfit_parts_is_refused(folder):
    with pytest.raises(UserError, match="the same repository"):
        make_pooler(folder[0], vocab_size=100)
    with pytest.raises(UserError, match="list of prompts"):
        make_pooler(folder[0])("a lake")
