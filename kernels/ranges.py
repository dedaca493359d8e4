"""Named ranges for NVIDIA's profilers: plan, upload, submit and wait of each batch, in the domain "offload".

With the package nvtx (``pip install -e '.[nvtx]'``) and a tool such as ``nsys profile`` around the process they
stand in its timeline; without the package there is nothing at all, without a tool next to nothing.
"""

import contextlib
import functools

__all__ = ("named_range",)

DOMAIN = "offload"
_NOTHING = contextlib.nullcontext()


def named_range(name):
    """A context manager that marks what happens inside by this name."""
    annotate = _annotate()
    return _NOTHING if annotate is None else annotate(name, domain=DOMAIN)


@functools.cache
def _annotate():
    try:
        from nvtx import annotate
    except ImportError:
        return None
    return annotate
