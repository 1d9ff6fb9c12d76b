"""A few windows of a long video through tiny random weights."""

import numpy as np

from magic141_jax.evaluation import drift, protocol
from magic141_jax.evaluation.templates import Search


def test_every_window_is_measured(pipeline, pack):
    scenes = protocol.draw_scenes(pack, "train", 1)
    search = Search(pack, protocol.frame_side(pipeline))
    values = drift.measure_drift(pipeline, pack, search, scenes, seconds=26 / 8)
    assert set(values) == set(drift.MEASURES)
    assert all(len(v) == 3 for v in values.values())  # windows end at frames 8, 16 and 24 of 26
    assert values["identity"] == [0, 0, 0]
    assert np.isfinite(values["subject_psnr"]).all()
    assert max(values["colour_error"]) > 5
