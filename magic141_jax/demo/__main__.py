"""`python -m magic141_jax.demo`: a web page that makes videos, over the same queue as the HTTP API (docs/serving.md).

python -m magic141_jax.demo --port 8000
"""

from __future__ import annotations

from collections.abc import Sequence

from magic141_jax.errors import requirements, run_entry_point

with requirements("requirements-serve.txt"):
    from magic141_jax.demo import page
    from magic141_jax.serve import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; raises `UserError` for what the user can mend."""
    args = launch.parse("python -m magic141_jax.demo", __doc__.splitlines()[0], argv)
    return launch.run(args, lambda app, worker: page.mount(app, worker, password=args.api_key))


if __name__ == "__main__":
    run_entry_point(main)
