"""Step distillation: roles over one frozen backbone, rollouts, and the methods as losses over roles (section 4)."""
