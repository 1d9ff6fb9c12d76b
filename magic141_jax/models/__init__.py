"""Networks only: each module holds one network beside its config dataclass."""
