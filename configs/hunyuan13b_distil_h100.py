"""Four-step distillation of the published 13B image-to-video network, on one node of 8 H100.

Part: as configs/hunyuan13b_distil_tpu.py, which says what is trained and how.
Data: as there.
Command: python train.py --config=configs/hunyuan13b_distil_h100.py --workdir=runs/13b --config.data.path=DATA
  --config.teacher=hunyuanvideo-community/HunyuanVideo-I2V-33ch (one line)
Hardware: never run, nor compiled whole; docs/layouts.md says what lies on each GPU. To look yourself:
  python -m magic141_jax.aot --config=configs/hunyuan13b_distil_h100.py --topology=h100:8
Expected: as there.
"""

from configs import hunyuan13b_distil_tpu


def get_config():
    """The config of the TPU slice with what a node of GPUs changes; every key can be overridden."""
    config = hunyuan13b_distil_tpu.get_config()
    config.data.threads = 16  # one process feeds all eight
    return config
