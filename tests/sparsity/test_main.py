"""The command line on a tiny weights folder: what is cut out is gone, what is masked is zero, and it still samples."""

import contextlib
import io
import re
import shutil

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.pipelines import TextToVideoPipeline, calibration
from magic141_jax.pipelines.components import load_components, load_plain
from magic141_jax.pytree import flatten
from magic141_jax.quantize import __main__ as quantize
from magic141_jax.quantize import plan
from magic141_jax.sparsity import __main__ as command
from magic141_jax.sparsity.scores import chosen, read_norms

MODULE = "magic141_jax.sparsity"
PROMPT = "a red shark moves left"
MAPS = re.compile(r"blocks\..*(qkv|attention_out|mlp_up|mlp_down)\.kernel$")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def run(*arguments):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command.main([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def folder(weights_folder, tmp_path_factory):
    """The tiny folder with two blocks of each kind; the second double block does nothing."""
    made = tmp_path_factory.mktemp("sparsity") / "dense"
    shutil.copytree(weights_folder, made)
    config, params = weights.load(made / "transformer")
    rng = np.random.default_rng(0)
    for stack in ("double_blocks", "single_blocks"):
        params[stack] = jax.tree.map(lambda x: np.concatenate([x, x * rng.uniform(0.5, 1.5)]), params[stack])
    for stream in ("video", "text"):
        for leaf in ("attention_out", "mlp_down"):
            own = params["double_blocks"][stream][leaf]
            own.update({name: np.concatenate([value[:1], 0 * value[1:]]) for name, value in own.items()})
    weights.save(made / "transformer", {**config, "double_blocks": 2, "single_blocks": 2}, params)
    return made


@pytest.fixture(scope="module")
def found(folder):
    """Samples of the folder, made once for all runs."""
    return calibration.examples(TextToVideoPipeline.from_pretrained(folder), [PROMPT, "the blue cat"])[-1:]


@pytest.fixture(scope="module")
def sampled(found):
    """All runs measure on `found`, until the test or fixture that called it is over."""

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "examples", lambda pipeline, prompts: found)
            patch.setattr(TextToVideoPipeline, "from_pretrained", lambda folder: None)
            yield

    return context


@pytest.fixture(scope="module")
def sparse(folder, sampled):
    """A folder pruned to 2:4 by activations, and what was printed."""
    with sampled():
        return folder.parent / "sparse", run(folder, folder.parent / "sparse", "--pattern", "2:4")


def kernels_of(folder):
    config, params = weights.load(folder / "transformer")
    params = load_plain(folder / "transformer").params if "kernels" in config else params
    return {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}


def config_of(folder):
    config = weights.read_config(folder / "transformer" / "config.json")
    assert config.pop("model") == "mmdit"
    return config


@pytest.mark.heavy
def test_units_are_cut_out(folder, tmp_path, sampled):
    """And norms are written that training with masks reads."""
    sizes = ["--double_blocks", 1, "--heads", 1, "--neurons", 16]
    with sampled():
        printed = run(folder, tmp_path / "new", *sizes, "--norms", tmp_path / "a" / "n.safetensors")
    config = config_of(tmp_path / "new")
    assert (config["double_blocks"], config["single_blocks"], config["heads"], config["mlp_ratio"]) == (1, 2, 1, 1.0)
    made = load_components(tmp_path / "new")
    before, after = load_plain(folder / "transformer").params, made.transformer.params
    shape = np.shape(before["double_blocks"]["video"]["modulation"]["kernel"][:1])
    assert after["double_blocks"]["video"]["modulation"]["kernel"].shape == shape
    np.testing.assert_array_equal(
        after["double_blocks"]["video"]["modulation"]["kernel"],
        before["double_blocks"]["video"]["modulation"]["kernel"][:1],
        err_msg="the block that does nothing went",
    )
    assert after["single_blocks"]["joint"]["qkv"]["kernel"].shape == (2, 16, 24)
    assert (tmp_path / "new/vae/model.safetensors").samefile(folder / "vae/model.safetensors")
    lines = printed.splitlines()
    assert re.match(
        r"0\.\d\d of 0\.\d\d M parameters, .* zero; velocities are off by \d+\.\d % of their norm", lines[0]
    )
    flags = dict(re.findall(r"--config\.model\.(\w+)=(\S+)", lines[1]))
    assert flags == {"double_blocks": "1", "heads": "1", "mlp_ratio": "1.0"}
    assert "pruning.inherit" not in lines[1] and lines[2] == f"wrote {tmp_path / 'new'}"
    norms = read_norms(tmp_path / "a" / "n.safetensors", chosen(before, MAPS.pattern))
    assert norms["single_blocks.joint.mlp_down.kernel"].shape == (2, 32)


def test_a_shorter_vector_of_conditions(folder, tmp_path, sampled):
    with sampled():
        printed = run(folder, tmp_path / "new", "--conditions", 8)
    assert config_of(tmp_path / "new")["condition_width"] == 8
    assert "--config.model.condition_width=8 " in printed
    made, before = load_components(tmp_path / "new").transformer.params, load_plain(folder / "transformer").params
    kernels = [flatten(params)["single_blocks.joint.modulation.kernel"].shape for params in (made, before)]
    assert kernels == [(2, 8, 48), (2, 16, 48)]


@pytest.mark.heavy
def test_a_block_that_does_nothing_costs_nothing(folder, tmp_path):
    """On real samples, which what is left makes as well."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    printed = run(folder, tmp_path / "new", "--double_blocks", 1, "--prompts", prompts)
    assert "velocities are off by 0.0 % of their norm" in printed
    assert config_of(tmp_path / "new") == config_of(folder) | {"double_blocks": 1}
    have, want = (TextToVideoPipeline.from_pretrained(path)(PROMPT).frames for path in (tmp_path / "new", folder))
    np.testing.assert_allclose(have, want, atol=1e-4)


def assert_masked(folder, target, share, group=None):
    """So many weights of each map are zero, a number of each group; all others are as they were."""
    assert config_of(target) == config_of(folder)
    before, after = kernels_of(folder), kernels_of(target)
    maps = {path for path in before if MAPS.search(path)}
    dense = [path for path in maps if (before[path] != 0).all()]
    assert len(dense) == 12, "all but the maps that are zero anyway"
    for path in dense:
        kept = after[path] != 0
        assert 1 - kept.mean() == pytest.approx(share, abs=0.02), path
        np.testing.assert_array_equal(np.where(kept, before[path], 0), after[path])
        if group:
            assert (kept.reshape(*kept.shape[:-2], -1, group, kept.shape[-1]).sum(-2) == group // 2).all()
    for path in set(before) - maps:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)


@pytest.mark.heavy
def test_single_weights_become_zero(folder, sparse):
    assert_masked(folder, sparse[0], 0.5, 4)
    assert "--config.pruning.inherit=True" in sparse[1] and "config.model" not in sparse[1]


def test_shares_and_distributions(folder, tmp_path, sampled):
    options = ["--pattern", "unstructured", "--sparsity", 0.75, "--distribution", "layer", "--score", "magnitude"]
    with sampled():
        run(folder, tmp_path / "new", *options)
    assert_masked(folder, tmp_path / "new", 0.75)


def test_the_score_decides(folder, tmp_path, sampled, sparse):
    """Of magnitudes the largest stay; what enters changes the choice."""
    with sampled():
        run(folder, tmp_path / "new", "--pattern", "2:4", "--score", "magnitude")
    path = "single_blocks.joint.mlp_down.kernel"
    before = np.abs(kernels_of(folder)[path])
    best = (before.reshape(2, 8, 4, 16).argsort(-2).argsort(-2) >= 2).reshape(before.shape)
    np.testing.assert_array_equal(kernels_of(tmp_path / "new")[path] != 0, best)
    assert ((kernels_of(sparse[0])[path] != 0) != best).any()


@pytest.mark.heavy
def test_what_is_pruned_is_packed_by_quantizing(tmp_path, sampled, sparse, monkeypatch):
    """Pruned, then quantized, then cut: each command takes the folder of the other."""
    monkeypatch.setattr(plan, "SMALLEST", 0)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize.main([str(sparse[0]), str(tmp_path / "small"), "--no_calibration", "--others", "as_is"])
    forms = weights.read_json(tmp_path / "small" / "transformer" / "config.json")["kernels"]
    for path, form in forms.items():
        if MAPS.search(path) and not path.startswith("double"):
            assert form["keep"] == [2, 4], path
    zeros = {path: leaf == 0 for path, leaf in kernels_of(sparse[0]).items()}
    for path, leaf in kernels_of(tmp_path / "small").items():
        np.testing.assert_array_equal(leaf[zeros[path]], 0, err_msg=path)
    with sampled():
        run(tmp_path / "small", tmp_path / "slim", "--neurons", 8, "--score", "magnitude")
    config = weights.read_json(tmp_path / "slim" / "transformer" / "config.json")
    assert config["mlp_ratio"] == 0.5 and "kernels" not in config
    assert {leaf.dtype for leaf in flatten(weights.load(tmp_path / "slim" / "transformer")[1]).values()} == {
        np.dtype("float32")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to prune"),
        (["--heads", "3"], "has 2 heads, of which 1 to all can be kept, not 3"),
        (["--single_blocks", "5"], "single_blocks has 2 blocks"),
        (["--pattern", "2to4"], "pruning.pattern is '2to4'"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "sparsity of 0.5, not of 0.3"),
        (["--pattern", "unstructured", "--sparsity", "1"], "below 1"),
        (["--pattern", "unstructured", "--distribution", "rows"], "pruning.distribution is 'rows'"),
        (["--pattern", "2:0"], "pruning.pattern is '2:0'"),
        (["--pattern", "2:4", "--paths", "attn"], "matches none of the kernels"),
        (["--pattern", "2:4", "--score", "hessian"], "invalid choice: 'hessian'"),
        (["--pattern", "2:4", "--prompts", "missing.txt"], "can't read prompts"),
    ],
)
def test_mistakes_are_one_line(command_line, folder, tmp_path, sampled, options, message):
    with sampled():
        code, _, err = command_line(MODULE, folder, tmp_path / "new", *options)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--heads", "1"], ["--pattern", "2to4"], ["--pattern", "2:4", "--sparsity", "7"]])
def test_what_needs_no_samples_is_checked_first(command_line, folder, monkeypatch, options):
    monkeypatch.setattr("magic141_jax.pipelines.components.load_plain", None)
    target = folder if "--heads" in options else folder.parent / "new"
    code, _, err = command_line(MODULE, folder, target, *options)
    assert code == 2 and re.search(r"is the folder that is read|pattern is '2to4'|below 1", err)
