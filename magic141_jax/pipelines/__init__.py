"""Text to image, image to video, text to video: what a user calls."""
