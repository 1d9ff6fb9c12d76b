"""The embedded default without a third of its transformer: what pruning took is learned again from the dense student.

Part: "inference memory cost optimization with parameter sparsification" of the paper; structured, so that it is faster
everywhere: half of the MLP neurons are kept, and 96 of the 256 values that modulate all blocks.
Data: as for configs/emoji64.py.
Before: python -m magic141_jax.sparsity default runs/cut --conditions 96 --neurons 512 \
  --prompts datasets/emoji/captions.txt
Command: python train.py --config=configs/emoji64_slim.py --workdir=runs/slim --config.init_from=runs/cut
  or, measured after each stage, python -m magic141_jax.recipe configs/emoji64_slim.toml --workdir runs/recipe
Hardware: two CPU cores, 2 to 3 s a step (40 minutes), twice that beside other work.
Expected: error of pictures .15 -> .06 in 500 steps -> .03 in 1000, of clips .04 -> .013, which are the dense student's
  own, and two or three points of identity less; docs/compression_experiments.md has the steps, at falling rates and at
  last with method.own_states=0.75, after which no score is more than 1.1 points lower.
"""

from configs import emoji64_trajectory


def get_config():
    """The config, every key of which can be overridden."""
    config = emoji64_trajectory.get_config()
    config.teacher = "weights/emoji64_4step"
    # the dense student's own steps: one of its evaluations each, without guidance
    config.method.update(guidance=1.0, substeps=1)
    config.model.update(mlp_ratio=512 / 256, condition_width=96)
    # clips recover within a hundred steps, pictures from text take all of the time
    config.data.update(image_batch=48, video_batch=3)
    config.optimizer.update(muon_learning_rate=1.2e-3, learning_rate=5e-4, warmup_steps=10, decay_fraction=0.85)
    config.train.steps = 1000
    return config
