"""The embedded default's long videos: an adapter that draws every window anew, the first picture in sight.

Part: the test-time sliding window of the paper, and its drift. The adapter (rank 32) learns to draw windows from
anywhere in a clip of four windows out of noise that leaves their places.
Data: python -m magic141_jax.data prepare emoji runs/emoji64_chains --weights weights/emoji64 --limit 2400
  --text_length 18 --windows 4 --kind video (one line)
Command: python train.py --config=configs/emoji64_redraw.py --workdir=runs/redraw
Hardware: two CPU cores, 3.4 s a step.
Expected: docs/long_video.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    config = student(
        {
            "name": "redrawing",
            "roles": {"student": "adapter", "rank": 32, "teacher_dtype": "bfloat16"},
            "windows": 4,
        },
        image_batch=0,
        video_batch=16,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 3e-3,
            "learning_rate": 2e-3,
            "warmup_steps": 20,
            "weight_decay": 0.0,
            "decay": "linear",
            "decay_fraction": 0.9,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 1000, "log_every": 10, "save_every": 50},
    )
    config.teacher = config.components_from = "weights/emoji64_4step"
    config.data.path = "runs/emoji64_chains"
    return config
