"""Stages of training, pruning and quantizing, run in order and measured after each."""
