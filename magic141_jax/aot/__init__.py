"""Ahead-of-time compilation: does a training step fit a TPU slice or a node of GPUs that nobody has at hand?"""
