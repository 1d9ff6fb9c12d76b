"""Pruning: which weights go, training while they go, and networks made smaller by what went."""
