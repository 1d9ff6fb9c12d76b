"""`python -m magic141_jax.serve`: videos over HTTP, in the shape of OpenAI's /v1/videos (docs/serving.md).

python -m magic141_jax.serve --port 8000 --state runs/serve
curl -F prompt="a shark moves left on a yellow background" http://127.0.0.1:8000/v1/videos
"""

from __future__ import annotations

from collections.abc import Sequence

from magic141_jax.errors import requirements, run_entry_point

with requirements("requirements-serve.txt"):
    from magic141_jax.serve import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; raises `UserError` for what the user can mend."""
    return launch.run(launch.parse("python -m magic141_jax.serve", __doc__.splitlines()[0], argv))


if __name__ == "__main__":
    run_entry_point(main)
