"""Step distillation: its losses, as pure functions, and its methods over named roles (Magic 1-For-1, section 4)."""
