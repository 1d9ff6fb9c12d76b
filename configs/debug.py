"""Flow matching of a few thousand parameters on random records: the loop's own test.

Part: the joint T2I / I2V / T2V objective (paper section 3), at toy size.
Command: python train.py --config=configs/debug.py --workdir=runs/debug
Hardware: one CPU core, under a minute, most of it compiling.
Expected: nothing is learned, the error of each task stays near 2.
"""

from magic141_jax.experiment import make_config


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={
            "model": "mmdit",
            "in_channels": 9,
            "out_channels": 4,
            "width": 16,
            "heads": 2,
            "head_width": 8,
            "double_blocks": 1,
            "single_blocks": 1,
            "refiner_blocks": 1,
            "rope_axes": (4, 2, 2),
            "text_width": 8,
            "pooled_width": 8,
            "time_features": 8,
        },
        image_encoder={"model": "image_encoder", "width": 8, "layers": 1, "heads": 2, "mlp": 16, "text_width": 8},
        method={"name": "flow_matching", "known_frames": (0.2, 0.8)},
        data={"path": "random", "image_batch": 2, "video_batch": 2, "height": 32, "width": 32, "num_frames": 5},
        optimizer={"warmup_steps": 2},
        train={"steps": 10, "log_every": 1, "save_every": 3},
        mesh={"data": 1},
    )
