"""The embedded default's student, first phase: each of its four steps learns four guided steps of the teacher.

Part: between sections 3.2 and 3.3 of the paper: guidance and 16 steps of the teacher go into four, noise by noise, so
that motion and diversity stay; configs/emoji64_distil.py starts from here.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_trajectory.py --workdir=runs/trajectory
Hardware: two CPU cores, 5 s a step, half an hour.
Expected: velocity errors (means over ten steps) of images .10 -> .04, of videos .06 -> .02. On held-out triples (16
  captions, seeds 0 and 1), the student against the teacher at 50 guided steps: identity of the image .81 (.88), of the
  last frame of T2V .47 (.44) and of I2V .63 (.50), motion 98 - 102 %, diversity 90 - 130 %, 21 times less DiT time. The
  teacher's eight steps are better than its fifty (T2V .72): two substeps, half the cost, remain to be tried.
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
