"""`python -m magic141_jax.demo`: a web page that makes videos, over the same queue as the HTTP API (docs/serving.md).

    python -m magic141_jax.demo --port 8000

The flags are those of `python -m magic141_jax.serve`.
"""

from __future__ import annotations

import functools

from magic141_jax.errors import requirements, run_entry_point

with requirements("requirements-serve.txt"):
    from magic141_jax.demo import page
    from magic141_jax.serve import launch

if __name__ == "__main__":
    run_entry_point(functools.partial(launch.main, "python -m magic141_jax.demo", __doc__, page.mount))
