"""The embedded default's transformer: text to image and image to video, jointly, at 64x64 and 17 frames.

Part: sections 3.1 and 3.2 of the paper: one network for T2I and I2V, image tokens before the text, known frames on the
channels; here with history noise too, so that windows chain into long videos.
Data: python -m magic141_jax.data prepare emoji runs/emoji64_data --weights weights/emoji64 --limit 12000
  --text_length 18 (one line)
Command: python train.py --config=configs/emoji64.py --workdir=runs/emoji64
Hardware: two CPU cores, 2.2 s a step, two hours (measured in slices, see the card); or one GPU, some minutes
  (estimated).
Expected: the card in weights/emoji64, measured by `python -m magic141_jax.evaluation`.
"""

import dataclasses

from magic141_jax.experiment import make_config
from magic141_jax.models.mmdit import SIZES


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={"model": "mmdit", **dataclasses.asdict(SIZES["emoji"]())},
        image_encoder={"model": "image_encoder", "token_rms": 0.12},  # about 1 after the whitening map of the text
        method={
            "name": "flow_matching",
            # Times near noise: few-step sampling never visits small t, and there is nothing to learn there but detail.
            "image_time": {"shift": 4.0},
            "video_time": {"shift": 4.0},
            "known_frames": (0.0, 1.0),
            "history_noise_probability": 0.4,
            "history_noise_max": 0.15,
            "init_records": 2048,
        },
        data={"path": "runs/emoji64_data", "image_batch": 20, "video_batch": 7, "threads": 1},
        optimizer={
            "name": "muon",
            "muon_learning_rate": 3e-3,
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "decay": "linear",
            "decay_fraction": 0.6,
            "final_fraction": 0.02,
            "b2": 0.98,
            "ema_decay": 0.998,
        },
        train={"steps": 3000, "log_every": 25, "save_every": 500},
        components_from="weights/emoji64",
        storage="bfloat16",
        sampling={
            "height": 64,
            "width": 64,
            "num_frames": 17,
            "fps": 8.0,
            "num_inference_steps": 8,
            "guidance_scale": 1.5,
            "shift": 4.0,
            "history_noise": 0.05,
        },
    )
