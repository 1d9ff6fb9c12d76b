"""The command line on a tiny weights folder: what is written loads in its forms, samples, and expands again."""

import contextlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax import weights
from magic141_jax.diffusion.conditioning import Conditioning, known_latents
from magic141_jax.errors import UserError
from magic141_jax.models import stored
from magic141_jax.pipelines import TextToVideoPipeline, calibration
from magic141_jax.pipelines.calibration import Example
from magic141_jax.pipelines.components import load_components, load_model, load_plain
from magic141_jax.pytree import flatten
from magic141_jax.quantize import __main__ as command
from magic141_jax.quantize import plan
from tests import published_pipelines
from tests.published_text import PROMPTS

MODULE = "magic141_jax.quantize"
PROMPT = "a red shark moves left"
PARTS = ("transformer", "vae", "image_encoder", "text_encoder")
DTYPES = {"int8": "int8", "int4": "uint8", "bfloat16": "bfloat16"}

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def random_example(pipeline, prompts, *, seed=0):
    """In the place of samples, which tests/pipelines/test_calibration.py is about."""
    del pipeline
    keys = jax.random.split(jax.random.key(seed), 3)
    x, text = (jax.random.normal(k, s) for k, s in zip(keys, ((len(prompts), 3, 4, 4, 4), (len(prompts), 6, 12))))
    cond = Conditioning(text, jnp.ones(text.shape[:2], bool), text[:, 0], *known_latents(x, 1, 3))
    return [Example(x, jnp.linspace(0.3, 0.9, len(prompts)), cond, None)]


@pytest.fixture(autouse=True, scope="module")
def no_kernel_is_too_small():
    """The tiny networks have no kernel that would be worth rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SMALLEST", 0)
        yield


def run(*arguments):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command.main([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(weights_folder, tmp_path_factory):
    """The tiny folder with one map pruned to 2:4, which half of its bytes are enough for."""
    made = tmp_path_factory.mktemp("quantize") / "pruned"
    shutil.copytree(weights_folder, made)
    config, params = weights.load(made / "transformer")
    kernel = np.asarray(params["single_blocks"]["joint"]["mlp_up"]["kernel"], np.float32)
    pairs = kernel.reshape(1, 4, 4, -1)
    kept = np.abs(pairs).argsort(-2).argsort(-2) >= 2
    params["single_blocks"]["joint"]["mlp_up"]["kernel"] = np.where(kept, pairs, 0).reshape(kernel.shape)
    weights.save(made / "transformer", config, params)
    return made


@pytest.fixture(scope="module")
def small(folder):
    """Folder and printed lines of a calibrated run with spared kernels and a report."""
    target, prompts = folder.parent / "small", folder.parent / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n\nthe blue cat moves right\n")
    options = ["--form", "int4", "--group", 8, "--rest", "int8", "--spare", 0.2, "--prompts", prompts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "examples", random_example)
        printed = run(folder, target, *options, "--report", folder.parent / "new" / "report.json")
    return target, printed


def forms_of(folder):
    return weights.read_json(folder / "config.json").get(stored.KEY, {})


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.heavy
def test_components_load_in_their_forms(small):
    """Never expanded on the way, and every kernel has a form: nothing was left out in silence."""
    target, _ = small
    made = load_components(target, dtype="bfloat16")
    params = {name: getattr(made, name).params for name in PARTS}
    for name in PARTS:
        forms, flat = forms_of(target / name), flatten(params[name])
        assert forms and not any(path.endswith(".kernel") for path in flat), name
        for path, form in forms.items():
            assert flat[f"{path}.values"].dtype == DTYPES[form["values"]], f"{name} {path}"
            assert (f"{path}.mask" in flat) == (form["keep"] is not None)
    kinds = {form["values"] for form in forms_of(target / "transformer").values()}
    assert kinds == {"int4", "int8"}
    assert {form["values"] for form in forms_of(target / "vae").values()} == {"int8"}
    assert forms_of(target / "transformer")["single_blocks.joint.mlp_up.kernel"]["keep"] == [2, 4]
    biases = {leaf.dtype for path, leaf in flatten(params["transformer"]).items() if path.endswith("bias")}
    assert biases == {jnp.dtype("bfloat16")}, "what is in no form is in the compute dtype"


def test_it_samples_what_the_source_samples(folder, small):
    options = {"seed": 1, "output_type": "np"}
    have, want = (TextToVideoPipeline.from_pretrained(path)(PROMPT, **options) for path in (small[0], folder))
    assert have.frames.shape == want.frames.shape == (1, 9, 32, 32, 3)
    off = np.sqrt(((have.latents - want.latents) ** 2).mean() / (want.latents**2).mean())
    assert 1e-4 < off < 0.3


def test_bytes_and_lines(folder, small):
    target, printed = small
    lines = printed.splitlines()
    assert lines[-1] == f"wrote {target}"
    assert lines[0].endswith("% of their norm, on 1 batches of samples")
    told = {line.split(":")[0]: line for line in lines[1:-1]}
    assert set(told) == set(PARTS)
    for name in PARTS:
        _, params = weights.load(target / name)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert f"in {held / 1e6:.2f} MB" in told[name]
        kernels = sum(leaf.nbytes for path, leaf in flatten(params).items() if stored.is_part(path))
        plain = load_plain(folder / name).params
        whole = sum(2 * leaf.size for path, leaf in flatten(plain).items() if path.endswith(".kernel"))
        assert kernels < 0.75 * whole, "of bfloat16; the scales of such small kernels weigh much"
    assert size(target) < size(folder)
    assert (target / "text_encoder/tokenizer.json").samefile(folder / "text_encoder/tokenizer.json")


def test_the_report_tells_of_every_kernel_and_layer(folder, small):
    report = json.loads((folder.parent / "new" / "report.json").read_text())
    kernels = {path for path in forms_of(small[0] / "transformer") if plan.re.search(plan.MAIN, path)}
    assert set(report) == {"error", "alone", "spared"} and set(report["alone"]) == kernels
    assert all(len(values) == 1 and values[0] > 0 for values in report["alone"].values())
    assert 0 < report["error"] < 0.3
    spared = report["spared"]
    assert len(spared) == round(0.2 * len(kernels))
    worst = min(report["alone"][path][0] for path in spared)
    assert worst >= max(report["alone"][path][0] for path in kernels - set(spared))
    values = {path: form["values"] for path, form in forms_of(small[0] / "transformer").items()}
    assert all(values[path] == ("int8" if path in spared else "int4") for path in kernels)


def test_expanding_gives_the_same_kernels(small, tmp_path):
    run(small[0], tmp_path / "plain", "--expand")
    for name in PARTS:
        assert not forms_of(tmp_path / "plain" / name)
        _, params = weights.load(tmp_path / "plain" / name)
        want = stored.dense(*load_model(small[0] / name))
        assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
            path: leaf.shape for path, leaf in flatten(want).items()
        }
        for path, leaf in flatten(want).items():
            np.testing.assert_array_equal(flatten(params)[path], leaf, err_msg=path)
    zeros = flatten(load_plain(tmp_path / "plain" / "transformer").params)["single_blocks.joint.mlp_up.kernel"] == 0
    assert zeros.mean() >= 0.5, "what was pruned is zero still"
    assert size(small[0]) < size(tmp_path / "plain")
    load_components(tmp_path / "plain")


def test_a_lora_is_for_plain_kernels(small, tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_v"
    tensors = {f"{name}.lora_A.weight": np.ones((2, 16), np.float32), f"{name}.lora_B.weight": np.ones((16, 2))}
    save_file({key: value.astype(np.float32) for key, value in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="quantize SRC DST --expand"):
        load_components(small[0], lora=tmp_path / "lora.safetensors")


def test_without_calibration_and_other_components(folder, tmp_path):
    printed = run(folder, tmp_path / "new", "--no_calibration", "--others", "as_is", "--no_pack", "--form", "float8")
    assert "velocities" not in printed and "vae" not in printed
    assert forms_of(tmp_path / "new" / "vae") == {}
    assert (tmp_path / "new/vae/model.safetensors").samefile(folder / "vae/model.safetensors")
    forms = forms_of(tmp_path / "new" / "transformer")
    assert {form["values"] for form in forms.values()} == {"float8_e4m3fn", "int8"}
    assert all(form["keep"] is None for form in forms.values())
    flat = flatten(load_components(tmp_path / "new").transformer.params)
    assert flat["single_blocks.joint.mlp_up.kernel.values"].dtype == jnp.float8_e4m3fn
    again = run(tmp_path / "new", tmp_path / "again", "--no_calibration", "--others", "as_is", "--form", "int4")
    assert "wrote" in again, "a folder in one form goes into another"
    assert forms_of(tmp_path / "again" / "transformer")["single_blocks.joint.mlp_up.kernel"]["keep"] == [2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "int3"], "invalid choice: 'int3'"),
        (["--spare", "1.5"], "it is a share of the kernels"),
        (["--no_calibration", "--spare", "0.1"], "leave out --no_calibration"),
        (["--no_calibration", "--report", "x.json"], "leave out --no_calibration"),
        (["--paths", "attn"], "no kernel's path matches 'attn'"),
        (["--paths", "("], "no regular expression"),
        (["--form", "bfloat16", "--group", "8"], "bfloat16 values have no scales"),
        (["--group", "-8"], "groups of -8 rows"),
        (["--form", "int8_activations", "--group", "8"], "with a scale a column"),
        (["--prompts", "missing.txt"], "can't read prompts from missing.txt"),
    ],
)
def test_mistakes_are_one_line(command_line, folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = command_line(MODULE, folder, tmp_path / "new", *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_folders_are_checked_before_anything_is_measured(command_line, folder, tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    monkeypatch.setattr("magic141_jax.pipelines.components.load_plain", None)
    for source, target, message in (
        (folder, folder, "is the folder that is read"),
        (folder, tmp_path / "thesis", "no weights folder"),
        (tmp_path / "missing", tmp_path / "new", "no weights folder"),
        (tmp_path / "thesis" / "chapter.tex", tmp_path / "new", "is a file"),
    ):
        code, _, err = command_line(MODULE, source, target)
        assert code == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.tex"]


def test_an_interrupt_leaves_nothing_half_written(command_line, folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", interrupt)
    options = ("--no_calibration", "--others", "as_is")
    code, _, err = command_line(MODULE, folder, tmp_path / "new", *options)
    assert code == 130 and err == "error: interrupted\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_a_published_folder(tmp_path):
    """Also encoders of several kinds, convolutions, and files beside the weights."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    published_pipelines.write(tmp_path / "published", "text")
    run(tmp_path / "published", tmp_path / "small", "--no_calibration", "--form", "int8")
    assert weights.read_json(tmp_path / "small" / "model_index.json")["_class_name"] == "HunyuanVideoPipeline"
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert "int8" in {form["values"] for form in forms_of(tmp_path / "small" / name).values()}
        assert not list((tmp_path / "small" / name).glob("diffusion_pytorch_model*"))
    options = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 5.0}
    pipelines = (TextToVideoPipeline.from_pretrained(tmp_path / name) for name in ("small", "published"))
    have, want = (pipeline(PROMPTS[0], **options) for pipeline in pipelines)
    off = np.sqrt(((have.latents - want.latents) ** 2).mean() / (want.latents**2).mean())
    assert 0 < off < 0.05
    assert np.abs(have.frames - want.frames).max() < 0.5
