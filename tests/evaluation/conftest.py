"""The pack and a search over it, made once; true frames of every third subject, on a torus, at any place."""

import numpy as np
import pytest

from magic141_jax.data.emoji import COLOURS, MOTIONS, EmojiPack, Scene
from magic141_jax.evaluation.templates import Search


@pytest.fixture(scope="session")
def pack():
    return EmojiPack()


@pytest.fixture(scope="session")
def search(pack):
    return Search(pack)


@pytest.fixture(scope="session")
def render(pack):
    """render(scene, frames) -> float32 frames in [0, 1]."""
    return lambda scene, frames=1, size=64: pack.render(scene, size=size, num_frames=frames).astype(np.float32) / 255


@pytest.fixture(scope="session")
def scenes(pack):
    """34 subjects of 36 pixels, standing anywhere, across the border too, on any colour, at any moment."""
    rng = np.random.default_rng(4)
    return [
        Scene(
            i, str(rng.choice(list(COLOURS))), "still", tuple(rng.integers(0, 64, 2) * 1.0), 36.0, int(rng.integers(24))
        )
        for i in range(0, len(pack.subjects), 3)
    ]


@pytest.fixture(scope="session")
def moving(pack):
    """Two scenes of every motion that start alike."""
    starts = [("shark", "yellow", (60.0, 3.0), 38.0, 5), ("tractor", "white", (20.0, 40.0), 34.0, 0)]
    return [Scene(pack.index(n), c, m, where, size, t) for n, c, where, size, t in starts for m in MOTIONS]
