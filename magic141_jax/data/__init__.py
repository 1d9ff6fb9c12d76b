"""Manifests, decoding, the emoji set, cached latents and the Grain pipeline."""
