"""Eight fake CPU devices, strict promotion of ranks, and a compilation cache shared by the test processes."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "magic141-jax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
