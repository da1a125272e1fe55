"""Progress of long loops, readable both in a terminal or notebook and in a batch log."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm  # plain: tqdm.auto's widget stalls headless under papermill


def track(iterable: Iterable, title: str, enabled: bool = True, **kwargs) -> Iterable:
    """``tqdm`` that updates live on a terminal and every half minute elsewhere, so that a log stays short."""
    return tqdm(iterable, desc=title, disable=not enabled, mininterval=0.2 if sys.stderr.isatty() else 30, **kwargs)
