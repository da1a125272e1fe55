"""Progress of long loops, readable in a terminal, in JupyterLab and in a batch log."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm  # plain: tqdm.auto's widget stalls headless under papermill


def track(iterable: Iterable, title: str, enabled: bool = True, **kwargs) -> Iterable:
    """``tqdm`` that updates live where somebody watches (a terminal, JupyterLab), and twice a minute elsewhere.

    It clears itself when done; in a notebook it writes to stdout, where it is not taken for an error, and in a batch run
    (``BMOE_BATCH``) what is over before half a minute leaves no trace in the executed copy.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    kernel, batch = shell is not None and "ipykernel" in sys.modules, bool(os.environ.get("BMOE_BATCH"))
    watched = sys.stderr.isatty() or (kernel and not batch)
    options = {"leave": False, "mininterval": 0.5 if watched else 30, "delay": 30 if batch else 0}
    return tqdm(iterable, desc=title, disable=not enabled, file=sys.stdout if kernel else sys.stderr, **(options | kwargs))
