"""Four-step distillation of the published 13B image-to-video network, on a TPU slice of 8 chips, v5p:2x2x2.

Part: section 4 of the paper, with the memory plan of MagicDistillation (arXiv 2503.13319): one frozen bfloat16 backbone
is teacher, student and fake score at once, the last two by an adapter each. Learning rates, ratio, ranges of s and
batch are those of published DMD runs on networks of this size, as far as they are known; the paper names none.
Data: clips of 544x960 and 81 frames prepared with the teacher's own VAE and text encoders (docs/published.md); text
  states hold the image rows (288) and the prompt's (252).
Command: python train.py --config=configs/hunyuan13b_distil_tpu.py --workdir=runs/13b --config.data.path=DATA
  --config.teacher=hunyuanvideo-community/HunyuanVideo-I2V-33ch (one line, on every host)
Hardware: never run; by the compiler it fits 8 chips of v5p (docs/layouts.md). Before you rent anything:
  python -m magic141_jax.aot --config=configs/hunyuan13b_distil_tpu.py --topology=v5p:2x2x2
  On 16 chips add --config.train.accumulate=4. Eight v6e or v5e hold it with a clip over all of them: add
  --config.mesh.fsdp=1 --config.mesh.context=8 --config.train.accumulate=64.
Expected: a student that samples in four Euler steps on [1, .9375, .8333, .625, 0] without guidance; 1,000 steps are 200
  updates of it. No numbers yet.
The other published layout replaces tokens instead and is guided by an embedding: add --config.model.in_channels=16
  --config.model.known=replace --config.model.guidance_embedding --config.method.guidance=1. Its text states have 144
  image rows; for random records --config.data.text_length=396 --config.data.image_tokens=144.
"""

import dataclasses

from magic141_jax.experiment import make_config
from magic141_jax.models.mmdit import SIZES


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={"model": "mmdit", **dataclasses.asdict(SIZES["hunyuan_13b"]())},
        method={
            "name": "dmd",
            "known_frames": (0.0, 1.0),
            "history_noise_probability": 0.0,  # the teacher was never shown any
            "walk": {"steps": 4, "shift": 5.0, "sampler": "euler"},
            "guidance": 5.0,
            "score_range": (0.02, 0.98),
            "roles": {"student": "adapter", "fake": "adapter", "rank": 64, "teacher_dtype": "bfloat16"},
        },
        data={
            "image_batch": 0,
            "video_batch": 64,
            "height": 544,
            "width": 960,
            "num_frames": 81,
            "fps": 24.0,
            "text_length": 540,
            "image_tokens": 288,
        },
        optimizer={
            "learning_rate": 5e-5,
            "warmup_steps": 10,
            "decay": "constant",
            "b1": 0.0,
            "b2": 0.999,
            "ema_decay": 0.99,
        },
        role_optimizers={"fake": {"ema_decay": 0.0}},
        train={"steps": 3000, "accumulate": 8, "log_every": 5, "save_every": 100},
        mesh={"data": 1, "fsdp": -1},  # one clip a chip at a time: 64 = 8 chips x 8 parts
        storage="bfloat16",
        sampling={
            "height": 544,
            "width": 960,
            "num_frames": 81,
            "fps": 24.0,
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            "shift": 5.0,
        },
    )
