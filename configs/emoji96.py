"""Text to image and image to video at 96x96, 17 frames: the emoji configuration for an accelerator.

Part: as configs/emoji64.py, with a wider and deeper network in bfloat16.
Data: first configs/emoji96_vae.py; put its weights/vae and weights/emoji64/text_encoder into one folder W, then
  python -m magic141_jax.data prepare emoji runs/emoji96_data --size 96 --weights W --limit 40000
Command: python train.py --config=configs/emoji96.py --workdir=runs/emoji96 --config.components_from=W
Hardware: one H100, about 20 minutes (estimated, not yet run); several GPUs split the batch by themselves.
Expected: T2I identity above 0.9 and motion direction above 0.95 by `python -m magic141_jax.evaluation` (a goal).
"""

import dataclasses

from magic141_jax.experiment import make_config
from magic141_jax.models.mmdit import SIZES


def get_config():
    """The config, every key of which can be overridden."""
    sizes = dataclasses.replace(
        SIZES["emoji"](), width=384, heads=6, double_blocks=2, single_blocks=6, compute_dtype="bfloat16"
    )
    return make_config(
        model={"model": "mmdit", **dataclasses.asdict(sizes)},
        image_encoder={"model": "image_encoder", "token_rms": 0.12},
        method={
            "name": "flow_matching",
            "image_time": {"shift": 4.0},
            "video_time": {"shift": 4.0},
            "known_frames": (0.0, 1.0),
            "history_noise_probability": 0.4,
            "history_noise_max": 0.15,
            "init_records": 2048,
        },
        data={"path": "runs/emoji96_data", "image_batch": 128, "video_batch": 64, "threads": 16},
        optimizer={
            "name": "muon",
            "muon_learning_rate": 3e-3,
            "learning_rate": 2e-3,
            "warmup_steps": 300,
            "decay": "linear",
            "decay_fraction": 0.6,
            "b2": 0.98,
            "ema_decay": 0.999,
        },
        train={"steps": 20000, "log_every": 50, "save_every": 2000},
        storage="int8",  # with the text encoder, 60 MB in all,
        sampling={
            "height": 96,
            "width": 96,
            "num_frames": 17,
            "fps": 8.0,
            "num_inference_steps": 8,
            "guidance_scale": 1.5,
            "shift": 4.0,
            "history_noise": 0.05,
        },
    )
