"""Distribution matching distillation of a few thousand parameters on random records: the loop's own test with roles.

Part: step distillation (paper section 4), at toy size: a full student of two steps, an adapter as the fake score.
Data: none; the teacher is what configs/debug.py trains, so run that first.
Command: python train.py --config=configs/debug_dmd.py --workdir=runs/debug_dmd
Hardware: one CPU core, under a minute, most of it compiling.
Expected: nothing is learned; the memory table is printed, and each role reports its loss.
"""

from configs import debug
from magic141_jax.experiment import make_config


def get_config():
    """The config of debug with another method, every key of which can be overridden."""
    config = debug.get_config().to_dict()
    config["method"] = {
        "name": "dmd",
        "known_frames": (0.2, 0.8),
        "walk": {"steps": 2},
        "ratio": 2,
        "roles": {"rank": 4},
    }
    rates = {"student": {"learning_rate": 3e-4}, "fake": {"learning_rate": 1e-3}}
    return make_config(**config | {"teacher": "runs/debug/weights", "role_optimizers": rates})
