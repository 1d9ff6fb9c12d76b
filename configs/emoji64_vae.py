"""The embedded default's video autoencoder: 64x64, 17 frames, 8x8x4 compression to 32 channels.

Part: the paper takes HunyuanVideo's VAE as it is; this is the small one of the embedded default.
Data: the emoji pack, composed on the fly; nothing to prepare.
Command: python train.py --config=configs/emoji64_vae.py --workdir=runs/emoji64_vae
Hardware: two CPU cores, about an hour; or one GPU, some minutes with --config.data.video_batch=64.
Expected: `video/psnr` above 31 dB at the end, and `video/psnr_first` above 32.
"""

from magic141_jax.experiment import make_config


def get_config():
    """The config, every key of which can be overridden."""
    return make_config(
        model={"model": "patch_vae"},
        method={
            "name": "autoencoding",
            "crop_frames": 9,
            "crop_size": 48,
            "l1": 0.5,
            "gradient": 0.25,
            "mse": 6.0,
            "kl": 3e-4,
        },
        data={"path": "emoji", "video_batch": 8, "threads": 1},
        optimizer={"learning_rate": 5e-4, "decay_fraction": 1.0, "b2": 0.98, "weight_decay": 1e-4, "ema_decay": 0.998},
        train={"steps": 4000, "log_every": 25, "save_every": 500},
        storage="bfloat16",
    )
