"""Progress of long loops, readable in a terminal, in JupyterLab and in a batch log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm  # plain: tqdm.auto's widget stalls headless under papermill


def track(iterable: Iterable, title: str, enabled: bool = True, **kwargs) -> Iterable:
    """``tqdm`` that updates live where somebody watches (a terminal, JupyterLab), and twice a minute in a batch run."""
    watched = sys.stderr.isatty() or ("ipykernel" in sys.modules and not os.environ.get("BMOE_BATCH"))
    return tqdm(iterable, desc=title, disable=not enabled, mininterval=0.5 if watched else 30, **kwargs)
