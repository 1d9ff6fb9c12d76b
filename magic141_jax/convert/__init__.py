"""Published weights in and out, through strict key tables."""
