"""Bayesian mixture-of-experts language models: curvature of the experts, posteriors, and the study around them.

``import bmoe_utils as bm``; the names below are loaded on first use, so that the command line answers at once.
"""

from importlib import import_module

_WHERE = {
    "ExpertLaplace": "laplace",
    "JointPosterior": "joint",
    "Predictions": "evaluate",
    "Study": "study",
    "attach_routers": "routers",
    "load_model": "models",
    "load_task": "tasks",
    "make_loader": "tasks",
    "option_logits": "models",
    "predict": "evaluate",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
