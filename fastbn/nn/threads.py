"""How many cores the layers use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import fastbn


@contextmanager
def threads(n: int) -> Iterator[None]:
    """`n` threads for fastbn and for NumPy's products within a `with` block."""
    from threadpoolctl import threadpool_limits

    with fastbn.threads(n), threadpool_limits(n, user_api="blas"):
        yield
