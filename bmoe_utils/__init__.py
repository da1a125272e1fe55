"""Bayesian mixture-of-experts language models: curvature of the experts, posteriors, and the study around them."""

from .evaluate import Predictions, predict
from .laplace import ExpertLaplace
from .models import load_model, option_logits
from .tasks import load_task, make_loader

__all__ = ["ExpertLaplace", "Predictions", "load_model", "load_task", "make_loader", "option_logits", "predict"]
