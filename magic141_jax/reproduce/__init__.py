"""A file made again from its own metadata, and compared with itself."""
