"""The server with a page in front, for people: prompt and picture in, windows as they are made, mp4 out."""
