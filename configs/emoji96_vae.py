"""The video autoencoder of the 96x96 emoji configuration, for an accelerator.

Part: as configs/emoji64_vae.py, with larger crops and batches.
Data: the emoji pack, composed on the fly; nothing to prepare.
Command: python train.py --config=configs/emoji96_vae.py --workdir=runs/emoji96_vae
Hardware: one GPU of 24 GB or more, about 15 minutes (estimated, not yet run); composing wants 4 or more CPU cores.
Expected: `video/psnr` a decibel above the 64x64 one's, as the same subjects have more pixels.
"""

from magic141_jax.experiment import make_config


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={"model": "patch_vae", "widths": (128, 256)},
        method={
            "name": "autoencoding",
            "crop_frames": 9,
            "crop_size": 64,
            "l1": 0.5,
            "gradient": 0.25,
            "mse": 6.0,
            "kl": 3e-4,
        },
        data={"path": "emoji", "video_batch": 64, "height": 96, "width": 96, "threads": 16},
        optimizer={"learning_rate": 7e-4, "decay_fraction": 1.0, "b2": 0.98, "weight_decay": 1e-4, "ema_decay": 0.998},
        train={"steps": 8000, "log_every": 50, "save_every": 1000},
    )
