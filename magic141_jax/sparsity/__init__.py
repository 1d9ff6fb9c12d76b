"""Pruning: scores of weights, masks from scores, and training that keeps the masks."""
