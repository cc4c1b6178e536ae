"""TVM's Python package, imported for the first time."""

from functools import lru_cache

from relax_llm import ffi


@lru_cache(maxsize=1)
def load_tvm() -> None:
    """Import `tvm`, the compiler and all, without PyTorch; before anything that says `import tvm` is imported.

    Raises:
        ArtifactError: It is not installed.
    """
    ffi.runtime()
    with ffi.without_torch():
        import tvm.relax  # noqa: F401
