"""Settings of the whole suite."""

import os
import tempfile

import jax
import jaxtyping
import pytest
from hypothesis import settings
from own_process import QUICK_TO_COMPILE

# Before any test imports the package: shapes and types in its signatures are checked on every call.
jaxtyping.install_import_hook(["slide_jax", "hfedmoe_jax"], "typechecker.typechecked")

# The tests spend their time compiling tiny programs; their results do not depend on it. Equal programs are
# compiled once a session, also those of other test workers and of processes that tests start.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# jit compiles on an example's first call, so an example's time says nothing.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops what a module has compiled: of all modules together it would fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked_types():
    """Switches off the check of annotations, for arguments whose wrong type the package itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
