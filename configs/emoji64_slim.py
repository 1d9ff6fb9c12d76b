"""The embedded default without 30 % of its transformer: what pruning took is learned again from the dense student.

Part: "inference memory cost optimization with parameter sparsification" of the paper; structured, so that it is faster
everywhere: three of four single-stream blocks and 416 of 1024 MLP neurons a block are kept.
Data: as for configs/emoji64.py.
Before: python -m magic141_jax.sparsity default runs/cut --single_blocks 3 --neurons 416
Command: python train.py --config=configs/emoji64_slim.py --workdir=runs/slim --config.init_from=runs/cut
  or, measured after each stage, python -m magic141_jax.recipe configs/emoji64_slim.toml --workdir runs/recipe
Hardware: two CPU cores, 2 to 3 s a step.
Expected: a clip from a picture as good as the dense one's within 500 steps, the picture from text not yet within 1400
  (identity .88 of .94): docs/compression_experiments.md.
"""

from configs.emoji64_distil import student


def get_config():
    """The config, every key of which can be overridden."""
    config = student(
        # of the dense student's own steps: one of its evaluations a step, without guidance
        {"name": "trajectory", "guidance": 1.0, "substeps": 1, "roles": {"student": "full"}},
        image_batch=48,  # clips recover within a hundred steps, pictures from text take all of the time
        video_batch=3,
        optimizer={
            "name": "muon",
            "muon_learning_rate": 1.5e-3,
            "learning_rate": 6e-4,
            "warmup_steps": 15,
            "decay": "linear",
            "decay_fraction": 0.85,
            "b2": 0.98,
            "ema_decay": 0.98,
        },
        train={"steps": 1200, "log_every": 10, "save_every": 100},
    )
    config.teacher = "weights/emoji64_4step"
    config.model.single_blocks = 3
    config.model.mlp_ratio = 416 / 256
    return config
