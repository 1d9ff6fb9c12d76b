"""The embedded default's long videos: an adapter that draws the known frames of a window anew.

Part: the test-time sliding window of the paper, and its drift: the frames that a window starts from are the student's
own, and wear off. The adapter (rank 32) is used between windows only; pictures and clips stay as they are.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_refiner.py --workdir=runs/refiner
Hardware: two CPU cores, 1.9 s a step.
Expected: error .88 -> .36 (the last 700 of 900 steps; the first 200 were of a first form of the loss, on two times of
  the student's walk, and from .65); what it does to a minute of video: docs/long_video.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    config = student(
        {"name": "refinement", "roles": {"student": "adapter", "rank": 32}},
        image_batch=0,
        video_batch=40,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 2.5e-3,
            "learning_rate": 1.5e-3,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "decay": "linear",
            "decay_fraction": 1.0,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 900, "log_every": 10, "save_every": 100},
    )
    config.teacher = config.components_from = "weights/emoji64_4step"
    return config
