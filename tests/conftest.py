"""What every test runs under; set before JAX first looks at its devices.

JAX_PLATFORMS=cuda runs them on a GPU; those that need several devices fail
there, and those that need a GPU are skipped elsewhere.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code is ready three times
# sooner, and without the fusion emitters again nearly twice. Flags given from
# outside come last and win.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  # Later versions have fusion emitters alone and end at a flag unknown to them.
  + "--xla_cpu_use_fusion_emitters=false "
  * version("jaxlib").startswith("0.10.")
  + os.environ.get("XLA_FLAGS", "")
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

install_import_hook("jaxmem", "beartype.beartype")
