"""First phase of the embedded default's student: each of its four steps learns four guided steps of the teacher.

Part: between sections 3.2 and 3.3 of the paper: where configs/emoji64_distil.py starts from.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_trajectory.py --workdir=runs/trajectory
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    return student(
        {"name": "trajectory", "guidance": 1.5, "substeps": 4, "roles": {"student": "full"}},
        image_batch=12,
        video_batch=5,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 4e-4,
            "learning_rate": 2.5e-4,
            "warmup_steps": 30,
            "decay": "linear",
            "decay_fraction": 0.9,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 400, "log_every": 10, "save_every": 50},
    )
