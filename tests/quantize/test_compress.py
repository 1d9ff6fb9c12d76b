"""Zeros stay zeros, patterns pack without loss, fewer bits cost more, and clipping pays by the norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models import stored
from magic141_jax.models.layers import Linear
from magic141_jax.models.network import Network
from magic141_jax.models.stored import QUANTIZED, Form
from magic141_jax.pytree import flatten
from magic141_jax.quantize import compress as lib
from magic141_jax.quantize.compress import compress, find_keep, pack

ROWS, COLUMNS, LAYERS = 64, 6, 2
VALUES = ("float32", "bfloat16", "int8", "int4", "float8_e4m3fn")
KEEPS = (None, (2, 4), (4, 8), (32, 64), (20, 0))


class Pair(nnx.Module):
    """A stack of maps, and one alone."""

    def __init__(self, config, *, rngs):
        self.many = Linear(*config, layers=LAYERS, rngs=rngs)
        self.one = Linear(*config, rngs=rngs)


NETWORK = Network.create(Pair, (ROWS, COLUMNS))


def pruned(rng, keep, shape, *, fewer=False, levels=0):
    """A random kernel that keeps n of every m rows of each column, or `fewer`; of few `levels`, many are equal."""
    n, m = keep or (shape[-2], 0)
    *stack, rows, columns = shape
    grouped = (*stack, rows // (m or rows), m or rows, columns)
    kept = rng.integers(0, n + 1, (*grouped[:-2], 1, columns)) if fewer else n
    mask = (rng.random(grouped).argsort(-2) < kept).reshape(shape)
    kernel = rng.normal(size=shape)
    if levels:
        kernel = np.where(kernel == 0, 1, np.sign(kernel)) * rng.integers(1, levels + 1, shape)
    return np.where(mask, kernel, 0).astype(np.float32)


def params_of(rng, keep, **options):
    return {
        "many": {"kernel": pruned(rng, keep, (LAYERS, ROWS, COLUMNS), **options), "bias": np.ones((LAYERS, COLUMNS))},
        "one": {"kernel": pruned(rng, keep, (ROWS, COLUMNS), **options), "bias": np.ones(COLUMNS)},
    }


def there_and_back(params, form):
    """Both kernels in a form, expanded again."""
    small, packed = compress(NETWORK, params, {"many.kernel": form, "one.kernel": form})
    return flatten(stored.dense(small, packed))


def error(kernel, form, norms=None):
    """The relative error of a kernel held in a form."""
    network, packed = compress(NETWORK, {"one": {"kernel": kernel}}, {"one.kernel": form}, norms=norms)
    del network
    module = stored.Stored(kernel.shape, form)
    for name, value in packed["one"]["kernel"].items():
        getattr(module, name)[...] = value
    return np.asarray(module[...]) - kernel


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keep", [None, (2, 4), (20, 0)])
def test_what_was_pruned_stays_zero(values, keep):
    """Whatever the form, also where kept values are equal, where fewer are kept than the form holds, or none."""
    form = Form(values, keep, 16 if values == "int4" else 0)
    for seed, options in enumerate(({"fewer": True}, {"levels": 2})):
        params = params_of(np.random.default_rng(seed), keep or (40, 0), **options)
        params["one"]["kernel"][:, 0] = 0
        made = there_and_back(params, form)
        for path in ("many.kernel", "one.kernel"):
            kernel = flatten(params)[path]
            np.testing.assert_array_equal(made[path][kernel == 0], 0, err_msg=f"{path} {options}")
            size = np.abs(kernel).max(-2, keepdims=True)
            step = {"float32": 0, "bfloat16": 2**-8, "float8_e4m3fn": 2**-3, "int8": 1 / 127, "int4": 0.35}[values]
            assert (np.abs(made[path] - kernel) <= step * size).all(), f"{path} {options}"
            np.testing.assert_array_equal(made["one.bias"], 1)


@pytest.mark.parametrize("keep", KEEPS)
def test_packing_alone_loses_nothing(keep):
    params = params_of(np.random.default_rng(0), keep)
    made = there_and_back(params, Form("float32", keep))
    for path, kernel in flatten(params).items():
        np.testing.assert_array_equal(made[path], kernel)
    rounded = there_and_back(params, Form("bfloat16", keep))["many.kernel"]
    np.testing.assert_array_equal(rounded, np.asarray(jnp.bfloat16(params["many"]["kernel"]), np.float32))


def test_parts_have_the_shapes_that_the_network_expects():
    params = params_of(np.random.default_rng(0), (2, 4))
    for values in VALUES:
        form = Form(values, (2, 4), 8 if values in QUANTIZED else 0)
        small, packed = compress(NETWORK, params, {"many.kernel": form, "one.kernel": form})
        wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(small.abstract_params).items()}
        found = {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(packed).items() if "bias" not in path}
        assert found == {path: leaf for path, leaf in wanted.items() if "bias" not in path}


def test_only_what_is_named_changes():
    params = params_of(np.random.default_rng(0), None)
    small, packed = compress(NETWORK, params, {"many.kernel": Form("int8")})
    assert set(flatten(packed)) == set(flatten(small.abstract_params))
    assert packed["one"]["kernel"] is params["one"]["kernel"]
    with pytest.raises(UserError, match=r"no kernel one\.kernels"):
        compress(NETWORK, params, {"one.kernels": Form("int8")})


def test_more_values_than_a_form_keeps_are_refused():
    kernel = pruned(np.random.default_rng(0), (3, 4), (ROWS, COLUMNS))
    with pytest.raises(ValueError, match="a group of 4 rows has 3 values, and the form keeps 2"):
        pack(jnp.asarray(kernel), Form("int8", (2, 4)))


def test_masks_are_filled_up_from_the_top():
    mask = jnp.array([[False, True], [True, False], [False, False], [False, False]])
    np.testing.assert_array_equal(lib.exactly(mask, (2, 4)).T, [[True, True, False, False]] * 2)
    np.testing.assert_array_equal(lib.exactly(mask, (3, 0)).sum(0), [3, 3])
    np.testing.assert_array_equal(lib.exactly(mask, (1, 2)), [[False, True], [True, False], [True, True], [False] * 2])


@pytest.mark.parametrize("keep", KEEPS[1:])
def test_patterns_are_found(keep):
    rng = np.random.default_rng(0)
    for shape in ((LAYERS, 128, 5), (128, 5), (2, 2, 32, 5)):
        flat = pruned(rng, keep, (*shape[:-3], 128, 5) if len(shape) < 4 else (128, 5))
        kernel = np.broadcast_to(flat, shape) if len(shape) < 4 else flat.reshape(shape)
        assert find_keep(jnp.asarray(kernel)) == keep, shape


@pytest.mark.parametrize(
    ("kernel", "keep"),
    [
        (np.ones((64, 3)), None),
        (np.zeros((64, 3)), None),
        (np.eye(60), None),  # a mask needs a multiple of 8 rows
        (np.eye(64), (2, 0)),  # one of each column, and an even number, for two stand in a byte
        (1 - np.eye(64), None),  # 63 are as good as all
        (np.arange(64)[:, None] % 2 * np.ones((1, 3)), (2, 4)),
        (np.arange(64)[:, None] % 8 // 4 * np.ones((1, 3)), (4, 8)),
        (np.arange(64)[:, None] // 32 * np.ones((1, 3)), (32, 64)),
        (np.arange(64)[:, None] % 4 // 3 * np.ones((1, 3)), (16, 0)),  # 1:4 fits 2:4, which would hold twice as many
        (np.concatenate([np.eye(64)[None], np.ones((1, 64, 64))]), None),  # every layer counts
    ],
)
def test_what_follows_no_pattern(kernel, keep):
    assert find_keep(jnp.asarray(kernel, jnp.float32)) == keep


def test_more_bits_and_smaller_groups_are_closer():
    kernel = np.random.default_rng(0).standard_t(4, size=(256, 16)).astype(np.float32)
    forms = [Form("int4"), Form("int4", group=32), Form("float8_e4m3fn"), Form("int8"), Form("int8", group=32)]
    forms += [Form("bfloat16"), Form("float32")]
    sizes = [np.sqrt((error(kernel, form) ** 2).sum() / (kernel**2).sum()) for form in forms]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), sizes
    assert sizes[0] < 0.2 and sizes[-1] == 0
    assert sizes[3] < 0.015 and sizes[1] < 0.15


def test_integers_are_rounded_to_the_nearest_level():
    kernel = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    parts = pack(jnp.asarray(kernel), Form("int8"))
    scale = np.abs(kernel).max(0, keepdims=True) / 127.5
    np.testing.assert_allclose(parts["scale"], scale, rtol=1e-6)
    want = np.clip(np.round(kernel / scale), -128, 127)
    assert (np.abs(np.asarray(parts["values"], int) - want) <= (np.abs(np.abs(kernel / scale) % 1 - 0.5) < 1e-3)).all()


def test_clipping_lowers_the_weighted_error(monkeypatch):
    """Group by group never worse than without, and by far better where large weights meet small inputs."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 16)).astype(np.float32)
    kernel[::16] *= 2
    norms = {"one.kernel": np.where(np.arange(64) % 16, 1, 0.05).astype(np.float32)}
    weight = np.square(norms["one.kernel"])[:, None]

    def weighted():
        made = error(kernel, Form("int4", group=16), norms)
        return (weight * made**2).reshape(4, 16, 16).sum(1)

    clipped, blind = weighted(), (weight * error(kernel, Form("int4", group=16)) ** 2).reshape(4, 16, 16).sum(1)
    monkeypatch.setattr(lib, "CLIPS", {})
    lib.quantize.clear_cache()
    plain = weighted()
    lib.quantize.clear_cache()
    assert (clipped <= plain + 1e-9).all() and clipped.sum() < 0.7 * plain.sum()
    assert (clipped <= blind + 1e-9).all() and clipped.sum() < 0.9 * blind.sum(), "the norms count"


def test_norms_of_a_stack_are_those_of_its_layers():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 32, 8)).astype(np.float32)
    norms = rng.exponential(size=(2, 32)).astype(np.float32) ** 2
    form = Form("int4", group=16)
    both = pack(jnp.asarray(kernel), form, norms)
    for layer in range(2):
        alone = pack(jnp.asarray(kernel[layer]), form, norms[layer])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=layer: x[i], both), alone)
