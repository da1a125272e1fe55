"""Random routed slots in float64 and what the maths makes of them by explicit loops: the references of the tests without a model."""

import itertools

import torch

from bmoe_utils.experts.jacobians import Routes
from bmoe_utils.experts.sums import first_sums

OPTIONS = {"hessian_structure": "kron", "fisher": "exact", "token_setting": "expand", "rank": None, "seed": 0}


def slots(S=40, d=3, f=4, K=3, experts=4, items=6, seed=0, empty=2):
    """``a, g, routes``: ``S`` slots in a random order of items within each expert; expert ``empty`` gets none."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, experts - 1, (S,), generator=g).sort().values
    expert = torch.where(expert >= empty, expert + 1, expert)
    a = torch.randn(S, f, generator=g, dtype=torch.float64)
    gradients = torch.randn(K, S, d, generator=g, dtype=torch.float64)
    item = torch.randint(0, items, (S,), generator=g)
    return a, gradients, Routes(item, torch.bincount(expert, minlength=experts), items)


def dense_jacobians(a, g, routes):
    """``[E, items, K, d, f]`` by an explicit loop over slots."""
    K, S, d = g.shape
    J = torch.zeros(len(routes.counts), routes.num_items, K, d, a.shape[1], dtype=torch.float64)
    for t, k in itertools.product(range(S), range(K)):
        J[routes.expert[t], routes.item[t], k] += torch.outer(g[k, t], a[t])
    return J


def add(sums, a, g, routes):
    """One batch."""
    sums.open(a, a.square().sum(1), routes)
    for column in g:
        sums.column(column, column.square().sum(1))
    sums.close()
    return sums


def summed(batches, **options):
    """The first pass's sums over batches of ``(a, g, routes)``."""
    a, g, routes = batches[0]
    shape = (len(routes.counts), g.shape[2], a.shape[1])
    sums = first_sums(OPTIONS | options, shape, torch.zeros(0, dtype=torch.float64))
    for batch in batches:
        add(sums, *batch)
    return sums
