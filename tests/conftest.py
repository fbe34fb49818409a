"""What every test runs under; set before JAX first looks at its devices."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: unoptimised code is ready three times
# sooner, and without the fusion emitters again nearly twice. Flags given from
# outside come last and win.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

install_import_hook("jaxmem", "beartype.beartype")
