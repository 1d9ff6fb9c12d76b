"""The embedded default's four-step student: distribution matching over the teacher in weights/emoji64.

Part: adversarial step distillation, section 3.3 of the paper: text to image and image to video together, the student
on its own rollouts of four steps, guidance folded in. At this size both scores are whole networks; adapters save memory
where it is short (`roles`).
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_distil.py --workdir=runs/distil
"""

from configs import emoji64
from magic141_jax.experiment import make_config

WALK = {"steps": 4, "shift": 4.0, "sampler": "euler"}
OPTIMIZER = {"learning_rate": 1e-4, "warmup_steps": 20, "weight_decay": 0.0, "ema_decay": 0.98}


def student(method, *, image_batch, video_batch, **rest):
    """A config that trains a student of weights/emoji64 by `method`; what of it they all share is here."""
    teacher = emoji64.get_config().to_dict()
    drawn = ("known_frames", "history_noise_probability", "history_noise_max")
    return make_config(
        **{name: teacher[name] for name in ("model", "image_encoder", "sampling", "components_from", "storage")},
        teacher="weights/emoji64",
        method={**{name: teacher["method"][name] for name in drawn}, "walk": WALK, **method},
        data={**teacher["data"], "image_batch": image_batch, "video_batch": video_batch},
        **rest,
    )


def get_config():
    """The config, every key of which can be overridden."""
    return student(
        {
            "name": "dmd",
            "guidance": 1.5,
            "score_time": {"kind": "uniform", "shift": 4.0},
            "ratio": 2,
            "roles": {"student": "full", "fake": "full"},
        },
        image_batch=24,
        video_batch=4,
        optimizer=OPTIMIZER,
        role_optimizers={"fake": {"learning_rate": 3e-4, "ema_decay": 0.0}},
        train={"steps": 1000, "log_every": 10, "save_every": 100},
    )
