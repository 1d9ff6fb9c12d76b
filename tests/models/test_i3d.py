"""I3D from a file in published names, against the same network in torch, written here from the paper's table."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.convert import i3d as convert
from magic141_jax.convert.engine import from_ours
from magic141_jax.errors import UserError
from magic141_jax.evaluation import networks
from magic141_jax.models.i3d import I3D, MIXED, POOLED, I3DConfig
from magic141_jax.models.network import Network
from magic141_jax.pytree import flatten, unflatten

CLASSES = 5


@pytest.fixture(scope="module")
def params():
    """Random parameters under which values neither die nor explode; variances are positive."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith("kernel"):
            return generator.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        around = path.endswith(("scale", "variance"))
        return (around + generator.uniform(-0.3, 0.3, leaf.shape)).astype(np.float32)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(network().abstract_params).items()})


@pytest.fixture(scope="module")
def published(params, tmp_path_factory):
    """The parameters as a file in pytorch-i3d's names."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in from_ours(params, convert.TABLE).items()}
    counted = {name.replace("running_var", "num_batches_tracked"): np.int64(1) for name in tensors if "_var" in name}
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.safetensors"
    save_file(tensors | {name: np.array(value) for name, value in counted.items()}, path)
    return path, tensors


def network():
    return Network.create(I3D, I3DConfig(CLASSES))


def clips(frames, side, count=2):
    return np.random.default_rng(1).random((count, frames, side, side, 3)).astype(np.float32)


def logits(tensors, x):
    """The network in torch, over (b, c, t, y, x)."""
    torch = pytest.importorskip("torch")
    f, own = torch.nn.functional, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}

    def padded(x, window, stride):
        pads = []
        for size, w, s in reversed(list(zip(x.shape[2:], window, stride, strict=True))):
            lack = max((-(-size // s) - 1) * s + w - size, 0)
            pads += [lack // 2, lack - lack // 2]
        return f.pad(x, pads)

    def unit(name, x, stride=1):
        kernel = own[f"{name}.conv3d.weight"]
        y = f.conv3d(padded(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
        norm = [own[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return f.relu(f.batch_norm(y, *norm, eps=1e-3))

    def pool(x, window, stride):
        return f.max_pool3d(padded(x, window, stride), window, stride)

    x = pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x))
    for name in MIXED:
        x = pool(x, *POOLED[name]) if name in POOLED else x
        branches = [unit(f"{name}.b0", x)]
        branches += [unit(f"{name}.b{i}b", unit(f"{name}.b{i}a", x)) for i in (1, 2)]
        x = torch.cat([*branches, unit(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))], dim=1)
    x = f.avg_pool3d(x, (2, *x.shape[3:]), stride=1)
    x = f.conv3d(x, own["logits.conv3d.weight"], own["logits.conv3d.bias"])
    return x.mean((2, 3, 4)).numpy()


@pytest.mark.parametrize(("frames", "side"), [(9, 32), (17, 40)])
def test_logits_are_those_of_torch(params, published, frames, side):
    torch = pytest.importorskip("torch")
    x = 2 * clips(frames, side) - 1
    with torch.no_grad():
        want = logits(published[1], torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy()))
    assert want.shape == (2, CLASSES) and np.ptp(want, axis=0).min() > 0, "the clips are told apart"
    np.testing.assert_allclose(network()(params, x), want, atol=2e-5 * np.abs(want).max())


def test_clips_are_enlarged_and_centred(params, published, monkeypatch):
    monkeypatch.setattr(networks, "I3D_SIDE", 32)
    (judge,) = networks.Networks.from_paths({"i3d": published[0]}).videos
    small = clips(9, 16, count=5)
    found = judge.clips(small)
    large = small.repeat(2, axis=2).repeat(2, axis=3)
    assert found.shape == (5, CLASSES), "a last batch that isn't full is filled up"
    want = network()(params, 2 * large - 1)
    assert np.corrcoef(found.ravel(), np.ravel(want))[0, 1] > 0.99
    assert judge.measure(small, small) == pytest.approx({"i3d_frechet": 0}, abs=1e-7)
    assert judge.measure(0 * small, small)["i3d_frechet"] > 1e-6


def test_short_clips_and_pickles_are_refused(params, tmp_path):
    with pytest.raises(UserError, match="9 frames or more, got 8"):
        network()(params, clips(8, 32))
    (tmp_path / "rgb_imagenet.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which is not read here"):
        networks.Networks.from_paths({"i3d": tmp_path / "rgb_imagenet.pt"})
