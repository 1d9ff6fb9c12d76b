"""How fast this machine samples: timings that say what else the machine did, and the command that prints them all."""
