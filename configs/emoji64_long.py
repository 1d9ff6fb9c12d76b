"""The embedded default's long videos: the student learns to go on from windows of its own making.

Part: the test-time sliding window of the paper, and training for it: known frames that the student made, decoded and
encoded anew, over chains of four windows; its own four steps on true frames are what it should do all the same.
Data: python -m magic141_jax.data prepare emoji runs/emoji64_chains --weights weights/emoji64 --limit 2400
  --text_length 18 --windows 4 (one line)
Command: python train.py --config=configs/emoji64_long.py --workdir=runs/long
Hardware: two CPU cores, 3 s a step.
Expected: docs/long_video.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    config = student(
        {"name": "streaming", "roles": {"student": "adapter", "rank": 32}},
        image_batch=8,
        video_batch=3,
        optimizer={
            "learning_rate": 1e-3,
            "warmup_steps": 20,
            "weight_decay": 0.0,
            "decay": "linear",
            "decay_fraction": 0.8,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 600, "log_every": 10, "save_every": 100},
    )
    config.teacher = "weights/emoji64_4step"
    config.data.path = "runs/emoji64_chains"
    return config
