"""What the model card claims, measured from the weights."""
