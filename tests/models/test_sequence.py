"""Where tokens lie: nothing is lost, nothing moves, windows stay inside."""

import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.models import sequence
from magic141_jax.sharding import MeshConfig

GRID, TEXT = (3, 5, 4), 7


@pytest.mark.parametrize("window", [None, (1, 1, 1)])
@pytest.mark.parametrize("context", [1, 8])
def test_tokens_come_back_from_their_places(window, context):
    mesh = sharding.make_mesh(MeshConfig(data=-1, context=context))
    tokens, words = jnp.arange(120.0).reshape(1, 60, 2) + 1, jnp.arange(14.0).reshape(1, 7, 2) + 1

    def there_and_back():
        layout = sequence.make(GRID, TEXT, tile=(2, 2, 2), window=window)
        joint = layout.join(layout.video(tokens), layout.words(words))
        assert joint.shape[1] % context == 0 and (joint != 0).all(-1).sum() == 67
        video, text = layout.part(joint)
        features = layout.grid(jnp.stack([video, 2 * video]), axis=2)
        return layout.grid(video), text[:, :TEXT], features[1]

    video, text, double = sharding.over(mesh, there_and_back)()
    np.testing.assert_array_equal(video, tokens)
    np.testing.assert_array_equal(double, 2 * tokens)
    np.testing.assert_array_equal(text, words)


def test_devices_have_parts_of_both():
    video, words = jnp.arange(8.0)[None], 10 + jnp.arange(4.0)[None]
    joint = sequence.join(video, words, 2)
    np.testing.assert_array_equal(joint[0], [0, 1, 2, 3, 10, 11, 4, 5, 6, 7, 12, 13])
    for got, want in zip(sequence.part(joint, 4, 2), (video, words)):
        np.testing.assert_array_equal(got, want)


def test_nothing_is_done_on_one_device():
    layout = sequence.make(GRID, TEXT)
    tokens, words = jnp.ones((1, 60, 2)), jnp.ones((1, TEXT, 2))
    assert layout.video(tokens) is tokens and layout.words(words) is words and layout.pattern is None


def test_every_tile_sees_as_many_and_windows_stay_inside():
    layout = sequence.make((5, 1, 4), 3, tile=(1, 1, 2), window=(3, 1, 1))
    group, sees, text = layout.pattern
    assert text == 3 and len(group) == 20 + 3 and sees.shape == (11, 11)
    assert sees[-1].all() and sees[:, -1].all()
    frames = sees[:-1, :-1].reshape(5, 2, 5, 2)
    assert (frames.sum((2, 3)) == 3).all()
    assert [np.flatnonzero(frames[f, 0, :, 0]).tolist() for f in range(5)] == [
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [2, 3, 4],
    ]


def test_large_tiles_are_filled_up_to_whole_vectors():
    layout = sequence.make((2, 12, 12), 1, tile=(1, 12, 12), window=(1, 1, 1))
    assert len(layout.order) == 2 * 256 and (layout.order >= 0).sum() == 288
    np.testing.assert_array_equal(layout.inverse, [*range(144), *range(256, 400)])
