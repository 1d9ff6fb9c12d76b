"""The embedded default, taught to make video from the text alone as well as it can: a teacher for one experiment.

Part: the paper says (section 1) that image to video is easier to distil than text to video. docs/experiments.md puts
that to the test, and needs a teacher of text to video for it; nothing else does.
Data: as for configs/emoji64.py.
Command: python train.py --config=configs/emoji64_text.py --workdir=runs/text
Hardware: two CPU cores, 2.5 s a step, ten minutes.
Expected: the loss falls from .8 to .45, and clips are far worse than by way of an image (docs/experiments.md): right
  colours, no subject that passes, and the right motion in three of ten.
"""

from configs import emoji64
from magic141_jax.experiment import make_config


def get_config():
    """The config of emoji64 without known frames and without images, every key of which can be overridden."""
    config = emoji64.get_config().to_dict()
    config["method"] |= {"known_frames": (1.0,)}
    config["data"] |= {"image_batch": 0, "video_batch": 10}
    config["optimizer"] |= {"muon_learning_rate": 1.5e-3, "learning_rate": 1e-3, "decay_fraction": 0.8}
    config["optimizer"] |= {"warmup_steps": 20, "ema_decay": 0.98}
    config["train"] |= {"steps": 240, "save_every": 80}
    return make_config(**config | {"init_from": "weights/emoji64"})
