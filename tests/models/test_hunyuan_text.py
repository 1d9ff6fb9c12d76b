"""HunyuanVideo's prompts against diffusers: templates, rows kept, pictures, cut prompts, batches; and misuse."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from magic141_jax import sharding
from magic141_jax.convert import clip as clip_convert
from magic141_jax.convert import llama as llama_convert
from magic141_jax.convert import llava as llava_convert
from magic141_jax.convert.engine import to_ours
from magic141_jax.errors import UserError
from magic141_jax.models import SHARDING_RULES, hunyuan_text
from magic141_jax.models.clip import ClipText
from magic141_jax.models.clip_inputs import ImageProcessor
from magic141_jax.models.hunyuan_text import HunyuanTextEncoder, read_image_processor, read_tokenizers
from magic141_jax.models.llama import Llama
from magic141_jax.models.llava import Llava
from magic141_jax.models.network import Network
from tests import published_text as published
from tests.published_text import PROMPTS, relative

LONG = " ".join(["lake"] * 300)
ASPECTS = [(97, 161), (400, 351), (336, 336)]


def pictures(count=3):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ASPECTS[:count]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    return path, *published.tokenizer_folder(path)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def theirs(torch, folder):
    """Their four parts and the modules of both pipelines, by name."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**published.llava_sizes()))
    return types.SimpleNamespace(
        text=pipeline_hunyuan_video,
        image=pipeline_hunyuan_video_image2video,
        llava=published.randomise(torch, llava),
        clip=published.randomise(
            torch, transformers.CLIPTextModel(transformers.CLIPTextConfig(**published.clip_text_sizes()))
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=published.llama_tokenizer(), pad_token="<pad>", padding_side="right"
        ),
        clip_tokenizer=transformers.CLIPTokenizer(vocab=folder[1], merges=folder[2], model_max_length=77),
        processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, resample=3
        ),
    )


@pytest.fixture(scope="module")
def networks(theirs):
    """Our networks with their parameters: (Llava, its Llama alone, CLIP)."""
    sizes, text_sizes = published.llava_sizes(), published.clip_text_sizes()
    config, text = llava_convert.config_to_ours(sizes), llama_convert.config_to_ours(sizes["text_config"])
    pooled = clip_convert.text_config_to_ours(text_sizes)
    state = published.tensors(theirs.llava)
    alone = {k.removeprefix("model.language_"): v for k, v in state.items() if "language_model" in k}
    return (
        loaded(Llava, config, llava_convert.table(config), state),
        loaded(Llama, text, llama_convert.table(text), alone),
        loaded(ClipText, pooled, clip_convert.TEXT_TABLE, published.tensors(theirs.clip)),
    )


def loaded(module, config, table, state):
    network = Network.create(module, config)
    return network, to_ours(state, table, network.abstract_params)


@pytest.fixture(scope="module")
def seeing(networks, folder):
    return HunyuanTextEncoder(networks[0], networks[2], *read_tokenizers(folder[0]))


@pytest.fixture(scope="module")
def blind(networks, folder):
    return HunyuanTextEncoder(networks[1], networks[2], *read_tokenizers(folder[0]))


def pipeline(module, theirs, **changes):
    """As much of a pipeline as encodes prompts."""
    parts = {
        "text_encoder": theirs.llava if module is theirs.image else theirs.llava.model.language_model,
        "tokenizer": theirs.tokenizer,
        "text_encoder_2": theirs.clip,
        "tokenizer_2": theirs.clip_tokenizer,
        "image_processor": theirs.processor,
        "_execution_device": "cpu",
    }
    cls = module.HunyuanVideoImageToVideoPipeline if module is theirs.image else module.HunyuanVideoPipeline
    fake = types.SimpleNamespace(**parts | changes)
    for name in ("_get_llama_prompt_embeds", "_get_clip_prompt_embeds", "encode_prompt"):
        setattr(fake, name, types.MethodType(getattr(cls, name), fake))
    return fake


def compare(have, want):
    states, pooled, mask = (value.numpy() for value in want)
    mask = mask.astype(bool)
    assert (np.asarray(have.mask) == mask).all()
    assert relative(np.asarray(have.states)[mask], states[mask]) < 1e-5
    assert not np.asarray(have.states)[~mask].any()
    assert relative(np.asarray(have.pooled), pooled) < 1e-5


def test_templates_are_the_published_ones(theirs):
    for module, template in ((theirs.text, hunyuan_text.TEXT_TEMPLATE), (theirs.image, hunyuan_text.IMAGE_TEMPLATE)):
        wanted = module.DEFAULT_PROMPT_TEMPLATE
        assert (f"{template.head}{{}}{template.tail}", template.start) == (wanted["template"], wanted["crop_start"])


@pytest.mark.parametrize("every", [2, 4])
def test_image_to_video_parity_with_diffusers(torch, theirs, seeing, every):
    prompts = [PROMPTS[0], "", PROMPTS[1]]
    with torch.no_grad():
        want = pipeline(theirs.image, theirs).encode_prompt(
            image=pictures(), prompt=prompts, image_embed_interleave=every
        )
    have = seeing.encode(prompts, pictures(), image_every=every)
    assert have.states.shape == (3, 576 // every + seeing.length, seeing.width) and seeing.length == 252
    compare(have, want)


@pytest.mark.filterwarnings("ignore:the prompt is longer than CLIP")
def test_text_to_video_parity_with_diffusers(torch, theirs, blind):
    with torch.no_grad(), pytest.warns(UserWarning, match="256 tokens"):
        want = pipeline(theirs.text, theirs).encode_prompt(prompt=[*PROMPTS, LONG])
        have = blind.encode([*PROMPTS, LONG])
    assert have.states.shape == (4, blind.length, blind.width) and blind.image_tokens == 0
    compare(have, want)


@pytest.mark.filterwarnings("ignore:the prompt is longer")
@pytest.mark.parametrize("every", [2, 4])
def test_rows_and_masks_of_every_length_are_those_of_diffusers(torch, theirs, seeing, every):
    """Their network is replaced by one whose states are the positions, so that its rows show in the output."""

    class Places:
        config, dtype = theirs.llava.config, torch.float32

        def __call__(self, input_ids, **_):
            places = torch.arange(input_ids.shape[1], dtype=torch.float32)[None, :, None].expand(*input_ids.shape, 1)
            return types.SimpleNamespace(hidden_states=[places] * 3)

    fake = pipeline(theirs.image, theirs, text_encoder=Places())
    template = theirs.image.DEFAULT_PROMPT_TEMPLATE
    for words in (0, 1, 30, *range(249, 259), 300):
        prompt = " ".join(["lake"] * words)
        rows, mask = fake._get_llama_prompt_embeds(pictures(1), [prompt], template, image_embed_interleave=every)
        tokens = seeing.tokenize([prompt])
        image = 576 // every
        assert tokens.rows[0].tolist() == rows[0, image:, 0].int().tolist(), words
        assert tokens.mask[0][tokens.rows[0]].tolist() == mask[0, image:].bool().tolist(), words


def test_ids_are_those_of_diffusers(theirs, seeing):
    encoded = theirs.tokenizer(
        [theirs.image.DEFAULT_PROMPT_TEMPLATE["template"].format(PROMPTS[0])],
        max_length=359,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    want = theirs.image._expand_input_ids_with_image_tokens(
        encoded.input_ids,
        encoded.attention_mask,
        359,
        theirs.llava.config.image_token_id,
        576,
        5,
        581,
        theirs.llava.config.pad_token_id,
    )
    tokens = seeing.tokenize(PROMPTS[:1])
    np.testing.assert_array_equal(tokens.ids, want["input_ids"])
    np.testing.assert_array_equal(tokens.mask, want["attention_mask"])


@pytest.mark.filterwarnings("ignore:the prompt is longer than CLIP")
def test_a_batch_of_cut_and_uncut_prompts_equals_each_alone(seeing):
    prompts, images = [PROMPTS[0], LONG, PROMPTS[1]], pictures()
    with pytest.warns(UserWarning, match="256 tokens"):
        together = seeing.encode(prompts, images)
        for i in range(3):
            alone = seeing.encode(prompts[i : i + 1], images[i : i + 1])
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[i], b[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("words", "dropped"), [(252, 0), (253, 1), (260, 8)])
def test_what_is_dropped_is_told(seeing, words, dropped, recwarn):
    seeing.tokenize([" ".join(["a"] + ["lake"] * (words - 1))])
    told = [str(w.message) for w in recwarn if "dropped" in str(w.message)]
    assert len(told) == bool(dropped)
    assert not dropped or told[0].endswith(repr(" ".join(["lake"] * dropped)))


def test_eight_devices_give_the_states_of_one(networks, folder, blind):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = [
        (network, jax.device_put(params, sharding.shardings(params, mesh, SHARDING_RULES[kind])))
        for (network, params), kind in zip(networks[1:], ("llama", "clip_text"))
    ]
    many = HunyuanTextEncoder(*placed, *read_tokenizers(folder[0])).encode(PROMPTS)
    for a, b in zip(many, blind.encode(PROMPTS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_black_pictures_of_any_size_are_alike(seeing):
    a = seeing.encode([""], [Image.new("RGB", (40, 30))])
    b = seeing.encode([""], np.zeros((1, 64, 96, 3), np.float32))
    np.testing.assert_array_equal(a.states, b.states)
    assert a.states.shape == (1, seeing.image_tokens + seeing.length, 32) and seeing.image_tokens == 288
    assert a.mask[:, :288].all()


def test_pictures_where_they_do_not_belong_are_refused(seeing, blind):
    with pytest.raises(UserError, match="together with pictures"):
        seeing.encode(PROMPTS)
    with pytest.raises(UserError, match="list of 3 pictures, got 2"):
        seeing.encode(PROMPTS, pictures(2))
    with pytest.raises(UserError, match="got a single one"):
        seeing.encode(PROMPTS, pictures(1)[0])
    with pytest.raises(UserError, match="reads prompts only"):
        blind.encode(PROMPTS, pictures())


def test_prompts_that_can_not_be_read_are_refused(seeing):
    with pytest.raises(UserError, match="holds <image>"):
        seeing.encode(["a lake <image>"], pictures(1))
    with pytest.raises(UserError, match="list of prompts"):
        seeing.encode("a lake", pictures(1))


def test_parts_that_do_not_fit_are_refused(networks, folder):
    tokenizer, clip_tokenizer = read_tokenizers(folder[0])
    with pytest.raises(UserError, match="224 pixels, the vision tower takes 336"):
        HunyuanTextEncoder(
            networks[0], networks[2], tokenizer, clip_tokenizer, processor=ImageProcessor(size=224, crop=224)
        )
    with pytest.raises(UserError, match="not the published 95"):
        HunyuanTextEncoder(networks[1], networks[2], read_tokenizers(folder[0])[1], clip_tokenizer)
    tokenizer.add_tokens([f"word{i}" for i in range(published.VOCABULARY)])
    with pytest.raises(UserError, match=f"language model knows {published.VOCABULARY}"):
        HunyuanTextEncoder(networks[1], networks[2], tokenizer, clip_tokenizer)
    with pytest.raises(UserError, match="does not fit its config"):
        HunyuanTextEncoder((networks[1][0], {}), networks[2], tokenizer, clip_tokenizer)


def test_files_that_are_missing_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json"):
        read_tokenizers(tmp_path)
    with pytest.raises(UserError, match=r"image_processor/preprocessor_config\.json"):
        read_image_processor(folder[0])
