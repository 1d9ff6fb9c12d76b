"""The embedded default's student, second phase: distribution matching with an adversarial term.

Part: adversarial step distillation, section 3.3 of the paper: text to image and image to video together, the student
on its own rollouts of four steps, guidance folded in. At this size both scores are whole networks; adapters save memory
where it is short (`roles`).
Data: as for configs/emoji64.py; it starts from what configs/emoji64_trajectory.py has trained.
Command: python train.py --config=configs/emoji64_distil.py --workdir=runs/distil
Hardware: two CPU cores, 5.3 s a step.
Expected: not trained to its end yet. For 50 steps the fake score's error has stayed at .19 (images) and .10 (clips).
  Judged at predictions it began at .32 and .13 and rose to .36 and .20 in 80 steps, since x0 early on the walk of a
  first-phase student is an average that the teacher's copy doesn't know; hence "end".
"""

from configs import emoji64
from magic141_jax.experiment import make_config

WALK = {"steps": 4, "shift": 4.0, "sampler": "euler"}


def student(method, *, image_batch, video_batch, **rest):
    """A config that trains a student of weights/emoji64 by `method`; what of it they all share is here."""
    teacher = emoji64.get_config().to_dict()
    drawn = ("known_frames", "history_noise_probability", "history_noise_max")
    return make_config(
        **{name: teacher[name] for name in ("model", "image_encoder", "sampling", "components_from")},
        teacher="weights/emoji64",
        storage="int8",
        method={**{name: teacher["method"][name] for name in drawn}, "walk": WALK, **method},
        data={**teacher["data"], "image_batch": image_batch, "video_batch": video_batch},
        **rest,
    )


def get_config():
    """The config, every key of which can be overridden."""
    return student(
        {
            "name": "dmd",
            "walk": {**WALK, "judged": "end"},  # after the first phase, x0 before the last step is an average
            "guidance": 1.5,
            "score_time": {"kind": "uniform", "shift": 4.0},
            "score_range": (0.15, 0.98),  # below, errors of a predicted sample become large ones of its velocity
            "ratio": 5,
            "adversarial": {"weight": 0.05},
            "roles": {"student": "full", "fake": "full"},
        },
        image_batch=12,
        video_batch=5,
        optimizer={"learning_rate": 2e-5, "warmup_steps": 20, "weight_decay": 0.0, "ema_decay": 0.97},
        role_optimizers={
            "fake": {"name": "muon", "muon_learning_rate": 6e-4, "learning_rate": 4e-4, "ema_decay": 0.0},
            "discriminator": {"learning_rate": 3e-4, "ema_decay": 0.0},
        },
        init_from="runs/trajectory/weights",
        train={"steps": 1000, "log_every": 10, "save_every": 100},
        watch={
            "every": 100,
            "warmup": 100,
            "generator": "student/video_adversarial",
            "critic": "discriminator/video_adversarial",
        },
    )
