"""What every test runs under; set before JAX first looks at its devices.

JAX_PLATFORMS=cuda runs them on a GPU; those that need several devices fail
there, and those that need a GPU are skipped elsewhere.
"""

import os
import shutil
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code is ready three times
# sooner, and without the fusion emitters again nearly twice. Flags given from
# outside come last and win.
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  # Later versions have fusion emitters alone and end at a flag unknown to them.
  # A program is not cut into pieces: the other cores have tests of their own.
  + "--xla_cpu_use_fusion_emitters=false "
  "--xla_cpu_parallel_codegen_split_count=1 "
  * version("jaxlib").startswith("0.10.")
  + os.environ.get("XLA_FLAGS", "")
)

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

install_import_hook("jaxmem", "beartype.beartype")


def pytest_configure(config):
  """Keep compiled programs for the session, in a folder of each worker.

  What a restarted run, a child or a new closure compiles once more is read. One
  folder for all workers would not do: files are not written atomically.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or config.getoption(
    "numprocesses", None
  ):
    return  # given from outside; or the workers run the tests
  folder = tempfile.mkdtemp(prefix="compiled-")
  config.add_cleanup(lambda: shutil.rmtree(folder))
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
