"""Bayesian mixture-of-experts language models: curvature of the experts, posteriors, and the study around them.

``import bmoe_utils as bm``; the names below are loaded on first use, so that the command line answers at once.

The rooms, each of which imports from those before it only (every room's ``__init__`` says what is in it):

    storage, progress, precision   beneath them all: writing that is whole or not at all, bars, number types
    data       questions and prompts
    models     language models, read out and trained
    scores     how good the answers are
    experts    the Laplace posterior over the experts
    routers    Bayesian routers
    joint      both posteriors together
    baselines  what they are compared with
    study      the study around them, and what runs it
"""

from importlib import import_module

_WHERE = {
    "ExpertLaplace": "experts.laplace",
    "JointPosterior": "joint.posterior",
    "Predictions": "scores.predictions",
    "Study": "study.study",
    "attach_routers": "routers.attach",
    "load_model": "models.loading",
    "load_task": "data.tasks",
    "make_loader": "data.tasks",
    "option_logits": "models.readout",
    "predict": "scores.predictions",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
