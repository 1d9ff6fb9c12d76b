"""The embedded default's long videos: an adapter for every window but the first.

Part: the test-time sliding window of the paper, and its drift. The adapter (rank 32) learns to go on from latents of
its own with the first picture's latent in sight; pictures and clips stay as they are.
Data: python -m magic141_jax.data prepare emoji runs/emoji64_long --weights weights/emoji64 --limit 1600
  --num_frames 129 --kind video --text_length 18 (one line)
Command: python train.py --config=configs/emoji64_continue.py --workdir=runs/continue
Hardware: two CPU cores, 5 s a step.
Expected: error .2 to .3 over a chain in 700 steps, of its first windows .13 to .2; not enough to hold a face for a
  minute, see docs/long_video.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    config = student(
        {
            "name": "continuation",
            "roles": {"student": "adapter", "rank": 32},
            "chain": 8,
            "history_noise_probability": 0.5,
            "history_noise_max": 0.2,
        },
        image_batch=0,
        video_batch=2,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 2.5e-3,
            "learning_rate": 1.5e-3,
            "warmup_steps": 10,
            "weight_decay": 0.0,
            "decay": "linear",
            "decay_fraction": 0.9,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 1000, "log_every": 10, "save_every": 100},
    )
    config.teacher = config.components_from = "weights/emoji64_4step"
    config.data.path = "runs/emoji64_long"
    config.data.num_frames = 129
    return config
