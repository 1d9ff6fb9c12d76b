"""Text to image and image to video at 96x96, 17 frames: the emoji configuration for an accelerator.

Part: as configs/emoji64.py, with a wider and deeper network in bfloat16.
Data: first configs/emoji96_vae.py; put its weights/vae and weights/emoji64/text_encoder into one folder W, then
  python -m magic141_jax.data prepare emoji runs/emoji96_data --size 96 --weights W --limit 40000
Command: python train.py --config=configs/emoji96.py --workdir=runs/emoji96 --config.components_from=W
Hardware: one H100, about 20 minutes (estimated, not yet run); several GPUs split the batch by themselves.
Expected: T2I identity above 0.9 and motion direction above 0.95 by `python -m magic141_jax.evaluation` (a goal).
"""

from configs import emoji64


def get_config():
    """The config of emoji64 with what an accelerator changes; every key can be overridden."""
    config = emoji64.get_config()
    config.model.update(width=384, heads=6, single_blocks=6, compute_dtype="bfloat16")
    config.data.update(path="runs/emoji96_data", image_batch=128, video_batch=64, threads=16)
    config.optimizer.update(warmup_steps=300, ema_decay=0.999)
    config.train.update(steps=20000, log_every=50, save_every=2000)
    config.sampling.update(height=96, width=96)
    config.components_from = ""  # 64x64 components don't fit: say which on the command line
    config.storage = "int8"  # with the text encoder, 60 MB in all
    return config
