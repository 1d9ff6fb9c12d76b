"""`python -m magic141_jax.serve`: videos over HTTP, in the shape of OpenAI's /v1/videos (docs/serving.md).

    python -m magic141_jax.serve --port 8000 --state runs/serve
    curl -F prompt="a shark moves left on a yellow background" http://127.0.0.1:8000/v1/videos

The flags are in `--help`; a signal ends it.
"""

from __future__ import annotations

import functools

from magic141_jax.errors import requirements, run_entry_point

with requirements("requirements-serve.txt"):
    from magic141_jax.serve import launch

if __name__ == "__main__":
    run_entry_point(functools.partial(launch.main, "python -m magic141_jax.serve", __doc__))
