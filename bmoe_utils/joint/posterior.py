"""Both posteriors together: sampled routings outside, the experts' linearised Laplace posterior inside.

    p(y | x) = E_{r ~ q(routing)} E_{f ~ N(f_r(x), Lambda_r(x))} softmax f,     Lambda_r = J_r Sigma J_r^T

For each of S routings (one sample per layer and forward pass, as whole-model inference of :class:`~bmoe_utils.routers.attach.Routers`
draws them): the class logits of that pass and their Jacobian in the experts' weights, one forward and C backward passes; with
``Sigma``, the posterior that was fitted on the model's own routing. Its noise held, a pass is differentiable in the weights
wherever no two experts tie, and its Jacobian is exact: what an earlier expert does to a later router is in it.

``q(W, r) = q(W) q(r)`` is an assumption: the two posteriors are fitted separately and taken as independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..experts.capture import capturing
from ..experts.curvature import probit_probabilities
from ..experts.laplace import CHOICES, ExpertLaplace
from ..progress import track
from ..routers.attach import Routers
from . import information
from .information import Decomposition

# Factors of the experts' prior precision to choose among: from twice the prior's standard deviation to a quarter of it.
SCALES = (0.25, 1.0, 4.0, 16.0)
# Logit samples a routing, quasi-random ones: in the enumerated case of tests/joint/test_joint.py the parts err by .002 nats (root mean
# square), with as many random ones by .015.
SAMPLES = 256


class JointPosterior:
    """The predictive of a fitted :class:`ExpertLaplace` and :class:`Routers` attached to the same model object.

    ``laplace`` must have been fitted before the routers were attached, or with them detached: nothing can tell afterwards.
    ``routers`` must be of whole-model inference; their ``num_samples`` is the number of routings (an ensemble's: its members, the
    deterministic router's: one). The routings are those ``routers(batch)`` draws: a function of its seed and the batch's real
    tokens, so that padding changes nothing; but where the noise is drawn token by token, an item in other company gets another
    draw of the same law (a batch of one settles it). The logits' noise is a function of the ``laplace`` seed alone, the same for all
    items and routings. ``ValueError`` if the two do not belong together, ``RuntimeError`` if one is not ready.
    """

    def __init__(self, laplace: ExpertLaplace, routers: Routers):
        if laplace.model is not routers.model:
            raise ValueError("the experts' posterior and the routers are of different model objects: attach the routers to laplace.model")
        self.laplace, self.routers = laplace, routers
        self._signals: dict[str, Tensor] = {}
        self._check()

    def _check(self) -> None:
        self.laplace._fitted()
        self.routers._check_attached()
        if self.routers.inference != "whole-model":
            raise ValueError(f"a routing is one sample per layer and pass, but these routers average {self.routers.inference} their layers: "
                             "set routers.inference = 'whole-model'")

    @property
    def num_routings(self) -> int:
        """S, forward passes a batch (each with C backward passes)."""
        method, number = self.routers.method, self.routers.num_samples
        return 1 if method == "deterministic" else self.routers.families[0].count_samples(number)

    def predictive_logits(self, batch: Mapping[str, Tensor], scales: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
        """The Gaussian of the class logits under every routing: means ``[S, B, C]`` (-inf: no such option) and covariances
        ``[S, B, C, C]``, each :meth:`ExpertLaplace.predictive_logits` of that pass.

        ``scales``: covariances ``[Q, S, B, C, C]``, the experts' prior precision multiplied by each; the passes are the same.
        """
        self._check()
        la, routers, training = self.laplace, self.routers, self.routers.training
        precision = None if scales is None else torch.as_tensor(scales).double()[:, None, None] * la.prior_precision_by_expert()
        means, covs = [], []
        routers.eval()
        try:
            for number in range(self.num_routings):
                routers.stream(number)
                routers.activate(number)
                if precision is None:
                    mean, cov = la.predictive_logits(batch)
                else:
                    with capturing(la.model):
                        mean, captured = la.captured(batch)
                    cov = sum(part.sum(1).to(mean.device) for part in la._covariances(captured, precision, len(mean)))
                    cov = (cov + cov.mT) / 2
                means.append(mean)
                covs.append(cov)
        finally:
            routers.stream(0)
            routers.activate(0)
            routers.train(training)
        return torch.stack(means), torch.stack(covs, 0 if scales is None else 1)

    def __call__(self, batch: Mapping[str, Tensor], link_approx: str = "mc", num_samples: int = SAMPLES) -> Tensor:
        """Probabilities ``[B, C]`` of the options, float64. ``mc``: softmax averaged over ``num_samples`` logits a routing, after
        which :meth:`signals` has the parts of their uncertainty; ``probit`` (closed form) and ``map`` (no posterior of the experts:
        ``routers(batch)``) average over the routings alone."""
        check_link(link_approx)
        points = self._points(batch, num_samples)
        probs, self._signals = linked(*self.predictive_logits(batch), link_approx, points)
        return probs

    def decompose(self, batch: Mapping[str, Tensor], num_samples: int = SAMPLES) -> Decomposition:
        """The parts of each item's predictive uncertainty (:mod:`bmoe_utils.joint.information`), of the very average that
        ``self(batch, num_samples=num_samples)`` gives."""
        points = self._points(batch, num_samples)
        return information.averaged_answer(*self.predictive_logits(batch), points)[1]

    def signals(self) -> dict[str, Tensor]:
        """``total``, ``aleatoric``, ``expert_epistemic`` and ``routing_epistemic`` of the last batch's items, nats ``[B]``; nothing after
        another link than ``mc``."""
        return dict(self._signals)

    def _points(self, batch: Mapping[str, Tensor], num_samples: int) -> Tensor:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        return information.normal_points(num_samples, batch["option_ids"].shape[1], self.laplace.options["seed"])

    # ---- tuning -----------------------------------------------------------------------------------------------------
    @property
    def router_precision(self) -> float:
        """The prior precision of Laplace routers, one for all layers. ``ValueError`` for another method: it has none."""
        if self.routers.method != "laplace":
            raise ValueError(f"routers of method {self.routers.method!r} have no prior precision to choose, only 'laplace' ones do")
        return float(self.routers.families[0].precision)

    @router_precision.setter
    def router_precision(self, value: float) -> None:
        if not (self.router_precision and 0 < value < float("inf")):
            raise ValueError(f"router_precision={value} is not positive and finite")
        for family in self.routers.families:
            family.precision = torch.full_like(family.precision, value)

    def validation_nll(self, loader: Iterable[Mapping[str, Tensor]], router_precisions: Sequence[float], scales: Sequence[float] = SCALES,
                       *, num_samples: int = SAMPLES, progress: bool = True) -> Tensor:
        """NLL of the joint predictive on ``loader`` (nats per item) ``[P, Q]`` for Laplace routers of every prior precision and the
        experts' precision times every scale; both are left as they were. A pass gives all scales: its Jacobians are theirs."""
        before = self.router_precision
        total, items = torch.zeros(len(router_precisions), len(scales), dtype=torch.float64), 0
        try:
            for batch in track(loader, "both posteriors: validation", progress):
                labels, points = batch["labels"].cpu(), self._points(batch, num_samples)
                if not (labels >= 0).all():
                    raise ValueError("the validation NLL needs a label on every item")
                items += len(labels)
                for i, precision in enumerate(router_precisions):
                    self.router_precision = precision
                    means, covs = self.predictive_logits(batch, scales)
                    for q, cov in enumerate(covs):
                        probs = linked(means, cov, "mc", points)[0]
                        picked = probs.gather(1, labels[:, None]).clamp(min=torch.finfo(probs.dtype).tiny)
                        total[i, q] -= picked.log().sum()
        finally:
            self.router_precision = before
        if not items:
            raise ValueError("the loader is empty")
        return total / items


def check_link(link_approx: str) -> None:
    if link_approx not in CHOICES["link_approx"]:
        raise ValueError(f"link_approx={link_approx!r} is not one of {', '.join(map(repr, CHOICES['link_approx']))}")


def linked(means: Tensor, covs: Tensor, link_approx: str, points: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Probabilities ``[B, C]``, float64 on the CPU, of the logits of every routing (``means [S, B, C]``, ``covs [S, B, C, C]``)
    under a link of :class:`JointPosterior`, and under ``mc`` the signals."""
    check_link(link_approx)
    if link_approx == "mc":
        probs, parts = information.averaged_answer(means, covs, points)
        return probs, parts.signals()
    link = probit_probabilities if link_approx == "probit" else lambda mean, _: mean.softmax(-1)
    probs = [link(m, v).cpu().double() for m, v in zip(means, covs, strict=True)]
    return torch.stack(probs).mean(0), {}
