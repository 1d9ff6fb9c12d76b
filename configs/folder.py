"""Fine-tunes the embedded default on your own clips: a folder of mp4, gif or png files with captions.csv.

Part: the joint objective of configs/emoji64.py, started from weights/emoji64.
Data: CLIPS/captions.csv with the columns file and caption. Decoded and encoded into WORKDIR/data on the first start,
  which lists what was left out and why.
Command: python train.py --config=configs/folder.py --config.data.path=CLIPS --workdir=runs/mine
Then: python sample.py --weights runs/mine/weights --prompt "..."
Hardware: two CPU cores, about 20 minutes for 500 steps; any GPU is faster.
Expected: `i2v` falls within the first 200 steps; with under a hundred clips it soon learns them by heart.
"""

import dataclasses

from magic141_jax.experiment import make_config
from magic141_jax.models.mmdit import SIZES

WEIGHTS = "weights/emoji64"


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={"model": "mmdit", **dataclasses.asdict(SIZES["emoji"]())},
        image_encoder={"model": "image_encoder"},
        method={"name": "flow_matching", "image_time": {"shift": 4.0}, "video_time": {"shift": 4.0}},
        data={"image_batch": 8, "video_batch": 8, "encoders": WEIGHTS},
        optimizer={"learning_rate": 2e-4, "warmup_steps": 50, "ema_decay": 0.99},
        train={"steps": 500, "save_every": 100, "sample_every": 250},
        init_from=WEIGHTS,
        components_from=WEIGHTS,
        storage="bfloat16",
    )
