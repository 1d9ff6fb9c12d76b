"""First phase of the embedded default's student: flow matching at the four times of its walk.

Part: between sections 3.2 and 3.3 of the paper: what the student sees of the data before configs/emoji64_distil.py.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_distil_data.py --workdir=runs/distil_data
Hardware: two CPU cores, 1.8 s a step, half an hour.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    return student(
        {"name": "regression", "roles": {"student": "full"}},
        image_batch=16,
        video_batch=8,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 8e-4,
            "learning_rate": 5e-4,
            "warmup_steps": 30,
            "decay": "linear",
            "decay_fraction": 0.9,
            "b2": 0.98,
            "ema_decay": 0.995,
        },
        train={"steps": 1000, "log_every": 10, "save_every": 100},
    )
