"""Quantization and packing: kernels of a trained network in forms of fewer bytes (`magic141_jax.models.stored`)."""
