"""The embedded default's student, first phase: each of its four steps learns two guided steps of the teacher.

Part: between sections 3.2 and 3.3 of the paper: guidance and eight steps of the teacher go into four, noise by noise,
so that motion and diversity stay; configs/emoji64_distil.py starts from here. Eight, since fifty guided steps of this
teacher overdraw detail: with four substeps a student came no nearer to the subject than the teacher's fifty.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_trajectory.py --workdir=runs/trajectory
Hardware: two CPU cores, 3 s a step, 40 minutes.
Expected: velocity errors (means over ten steps) of images .10 -> .04, of videos .06 -> .02; the card in
  weights/emoji64_4step, whose four runs are told there, and docs/experiments.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    return student(
        {"name": "trajectory", "guidance": 1.5, "substeps": 2, "roles": {"student": "full"}},
        image_batch=18,
        video_batch=6,
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
        train={"steps": 800, "log_every": 10, "save_every": 100},
    )
