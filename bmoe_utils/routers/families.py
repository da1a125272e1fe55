"""The families of Bayesian routers: what each adds to one layer's deterministic logits. One class a method.

``u [n, d]`` are the real tokens' router inputs, ``l = W u`` the model's own logits. A family answers with *offsets* of the
logits, ``centre [n, E]`` and ``deviations [S, n, E]``, so that a sample is ``l + centre + deviation``: with nothing learned
and no variance both are exactly zero. Weights are kept as differences from the model's ``W`` for the same reason, and
in float32 beside a bfloat16 model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from . import maths


class Family(nn.Module):
    """One layer's deterministic router, and the base of the others."""

    defaults: dict = {}
    selects = False  # True: the method samples the selection and has no distribution over logits
    centred = False  # True: deviations are from the samples' own mean, which costs their variance a degree of freedom

    def __init__(self, router: nn.Module, **options):
        super().__init__()
        object.__setattr__(self, "router", router)  # not a submodule: the model's weights are not this module's
        self.num_experts, self.width = router.weight.shape
        self.options = options
        self.dtype = torch.float64 if router.weight.dtype == torch.float64 else torch.float32
        # [E, d] and [E] where the prior mean is not the model's own router
        self.register_buffer("mean_shift", torch.zeros(0, self.width))
        self.register_buffer("bias_shift", torch.zeros(0))
        self.build(**options)
        self.to(router.weight.device, self.dtype)

    def build(self) -> None:
        """Creates parameters and buffers."""

    @property
    def weight(self) -> Tensor:
        """The prior mean ``W [E, d]``, out of the graph, in this module's dtype."""
        weight = self.router.weight.detach().to(self.dtype)
        return weight + self.mean_shift if len(self.mean_shift) else weight

    def offsets(self, u: Tensor, samples: int, generator: torch.Generator,
                moments: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """``centre [n, E]`` and ``deviations [S, n, E]`` (None: none) of the logits; in train mode of what is trained.

        ``moments``: those of the same ``u``, where they are already known.
        """
        return u.new_zeros(len(u), self.num_experts), None

    def moments(self, u: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the logits are Gaussian: ``centre [n, E]`` and a root of their covariance, ``[n, E]`` (diagonal) or ``R`` of
        ``Sigma = R R^T``, ``[n, E, any]``."""
        return None

    def divergence(self, u: Tensor) -> Tensor | None:
        """What the ELBO charges each token, ``[n]``; None where the method has no such term."""
        return None

    def count_samples(self, samples: int) -> int:
        return samples


def _randn(generator: torch.Generator, *shape: int, like: Tensor) -> Tensor:
    return torch.randn(*shape, dtype=like.dtype, device=like.device, generator=generator)


class Gaussian(Family):
    """Gaussian logits, drawn token by token from their moments in antithetic pairs (:func:`maths.mirrored`)."""

    def offsets(self, u, samples, generator, moments=None):
        centre, root = self.moments(u) if moments is None else moments
        noise = _randn(generator, (samples + 1) // 2, len(u), root.shape[-1], like=u)
        half = root * noise if root.dim() == 2 else torch.einsum("nij,snj->sni", root, noise)
        return centre, maths.mirrored(half, samples)


# ---- weight space ---------------------------------------------------------------------------------------------------
class MCDropout(Family):
    """Dropout on the router's input, in training and at inference (arXiv 1506.02142).

    ``mask="token"``: a mask per sample and token. ``"sample"``: one per sample for all tokens of a pass, which is dropout of
    W's columns; every token's logits have the same law as with a mask of its own, only not independently of its neighbours'.
    """

    defaults = {"dropout": 0.1, "mask": "token"}

    def build(self, dropout: float, mask: str) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not in [0, 1)")
        if mask not in ("token", "sample"):
            raise ValueError(f"mask={mask!r} is not 'token' or 'sample'")
        self.delta = nn.Parameter(torch.zeros(self.num_experts, self.width))

    def offsets(self, u, samples, generator, moments=None):
        p, weight = self.options["dropout"], (self.weight + self.delta).mT.contiguous()  # [d, E]
        positions = lambda trials: maths.bernoulli_positions(trials, p, u, generator)  # noqa: E731
        dropped = []  # what each mask takes from the logits, [n, E]: only the inputs it drops are drawn and multiplied
        if self.options["mask"] == "token":
            flat, rows = u.reshape(-1), torch.arange(0, u.numel(), self.width, device=u.device)
            for _ in range(samples):
                at = positions(len(flat))
                dropped.append(embedding_bag(at % self.width, weight, torch.searchsorted(at, rows), mode="sum",
                                             per_sample_weights=flat.index_select(0, at)))
        else:
            columns, at = u.mT.contiguous(), positions(samples * self.width)
            ends = torch.searchsorted(at, torch.arange(1, samples + 1, device=u.device) * self.width)
            for one in (at % self.width).tensor_split(ends[:-1].tolist()):
                dropped.append(columns[one].mT @ weight[one])
        return u @ self.delta.mT, (p * (u @ weight) - torch.stack(dropped)) / (1 - p)  # the noise alone: 0.0 at p = 0


class Swag(Family):
    """SWA mean, diagonal and low-rank deviations of ``W`` along the tail of training (arXiv 1902.02476).

    One weight sample serves all tokens of a forward pass; a new pass draws new ones. Inside, they come in antithetic pairs.
    """

    defaults = {"rank": 20, "scale": 0.5}

    def build(self, rank: int, scale: float) -> None:
        if rank < 2 or scale < 0:
            raise ValueError(f"SWAG needs rank >= 2 and scale >= 0, not rank={rank}, scale={scale}")
        shape = (self.num_experts, self.width)
        self.delta = nn.Parameter(torch.zeros(shape))  # the trajectory's current point
        for name, value in (("mean", torch.zeros(shape)), ("variance", torch.zeros(shape)), ("low_rank", torch.zeros(1, *shape))):
            self.register_buffer(name, value)

    def offsets(self, u, samples, generator, moments=None):
        if self.training:
            return u @ self.delta.mT, None
        noise = maths.swag_sample(torch.zeros_like(self.mean), self.variance, self.low_rank, (samples + 1) // 2,
                                    scale=self.options["scale"], generator=generator)
        return u @ self.mean.mT, maths.mirrored(torch.einsum("nd,sed->sne", u, noise), samples)

    def moments(self, u):  # linear in Gaussian weights: the logits are Gaussian too, exactly
        own = torch.diag_embed((u.square() @ self.variance.mT).sqrt())
        along = torch.einsum("nd,ked->nek", u, self.low_rank)
        return u @ self.mean.mT, math.sqrt(self.options["scale"]) * torch.cat([own, along], -1)


class Ensemble(Family):
    """M routers trained from different seeds and orders (arXiv 1612.01474); the samples are the members, each once."""

    defaults = {"members": 5}
    centred = True

    def build(self, members: int) -> None:
        if members < 1:
            raise ValueError(f"an ensemble needs at least one member, not members={members}")
        # A parameter each: an optimizer leaves those without a gradient alone, its weight decay included.
        self.members = nn.ParameterList(torch.zeros(self.num_experts, self.width) for _ in range(members))
        self.active = 0  # the member in training, or of this pass in whole-model inference

    @property
    def delta(self) -> Tensor:
        """Every member's difference from the model's weight, ``[M, E, d]``."""
        return torch.stack(list(self.members))

    def count_samples(self, samples: int) -> int:
        return self.options["members"]

    def offsets(self, u, samples, generator, moments=None):
        if samples == 1:
            return u @ self.members[self.active % len(self.members)].mT, None
        logits = torch.einsum("nd,sed->sne", u, self.delta)
        return logits.mean(0), logits - logits.mean(0)


class Laplace(Gaussian):
    """Kronecker Laplace of ``W`` from the task's likelihood; its logits are the exact Gaussian of that posterior.

    ``l | u ~ N(W u, U_G diag(v(u)) U_G^T)`` (:func:`maths.kron_logit_variance`). Unfitted it is the prior.
    """

    defaults = {"prior_precision": 1.0}

    def build(self, prior_precision: float) -> None:
        if not prior_precision > 0:
            raise ValueError(f"prior_precision={prior_precision} is not positive")
        E, d = self.num_experts, self.width
        zeros = {"alpha": (0,), "basis_a": (d, 0), "gamma": (E,)}
        for name, shape in zeros.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("basis_g", torch.eye(E))
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("precision", torch.tensor(float(prior_precision)))

    def moments(self, u):
        v = maths.kron_logit_variance(u, self.alpha, self.basis_a, self.gamma, self.count, self.precision)
        return u.new_zeros(len(u), self.num_experts), self.basis_g * v.sqrt()[:, None, :]


# ---- logit space ----------------------------------------------------------------------------------------------------
def _head(width: int, outputs: int, bias: Tensor | float = 0.0) -> nn.Linear:
    """A linear layer that starts as the constant ``bias``."""
    layer = nn.Linear(width, outputs)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(torch.as_tensor(bias).expand(outputs))
    return layer


def _trunk(width: int, hidden: int | None) -> nn.Sequential:
    hidden = max(1, width // 4) if hidden is None else hidden
    if hidden < 1:
        raise ValueError(f"trunk={hidden}: the trunk needs at least one unit")
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU())


class MeanField(Gaussian):
    """``q(l|u) = N(l_det + dmu(u), diag s^2(u))``, prior ``N(l_det, prior_std^2 I)``, in the paper the unit one; a shared
    trunk of width d/4 (arXiv 2603.09453). ``init_std``: where ``s`` starts, by default at the prior: unfitted it is the prior."""

    defaults = {"trunk": None, "prior_std": 1.0, "init_std": None}

    def build(self, trunk: int | None, prior_std: float, init_std: float | None) -> None:
        init_std = prior_std if init_std is None else init_std
        for name, value in (("prior_std", prior_std), ("init_std", init_std)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} is not positive")
        self.trunk = _trunk(self.width, trunk)
        hidden = self.trunk[0].out_features
        self.mu = _head(hidden, self.num_experts)
        self.scale = _head(hidden, self.scale_size, self.scale_bias(math.log(init_std)))

    @property
    def scale_size(self) -> int:
        return self.num_experts

    def scale_bias(self, log_std: float) -> Tensor | float:
        return log_std

    def _parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(u)
        return self.mu(h), self.scale(h)

    def moments(self, u):
        mu, log_std = self._parts(u)
        return mu, log_std.exp()

    def divergence(self, u):
        mu, log_std = self._parts(u)
        prior = self.options["prior_std"]
        return maths.kl_diagonal(mu / prior, log_std - math.log(prior))


class FullCovariance(MeanField):
    """The same with a Cholesky factor ``L(u)``, its diagonal through exp: ``q(l|u) = N(l_det + dmu(u), L L^T)``.

    ``rank=r``: ``diag s^2(u) + V(u) V(u)^T`` instead, ``V [E, r]``. The head has ``E (1 + r)`` outputs and not ``E (E + 1) / 2``.
    """

    defaults = MeanField.defaults | {"rank": None}

    def build(self, trunk: int | None, prior_std: float, init_std: float | None, rank: int | None) -> None:
        if rank is not None and not 1 <= rank <= self.num_experts:
            raise ValueError(f"rank={rank} is not None (a full Cholesky factor) or between 1 and the {self.num_experts} experts")
        super().build(trunk, prior_std, init_std)
        rows, columns = torch.tril_indices(self.num_experts, self.num_experts)
        self.register_buffer("lower", rows * self.num_experts + columns, persistent=False)  # where L's entries stand in [E * E]

    @property
    def scale_size(self) -> int:
        E, rank = self.num_experts, self.options["rank"]
        return E * (E + 1) // 2 if rank is None else E * (1 + rank)

    def scale_bias(self, log_std):
        if self.options["rank"] is not None:
            return torch.cat([torch.full((self.num_experts,), log_std), torch.zeros(self.scale_size - self.num_experts)])
        rows, columns = torch.tril_indices(self.num_experts, self.num_experts)
        return (rows == columns) * log_std

    def _low_rank(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        log_std, V = entries.split([self.num_experts, self.scale_size - self.num_experts], -1)
        return log_std, V.unflatten(-1, (self.num_experts, -1))

    def moments(self, u):
        mu, entries = self._parts(u)
        if self.options["rank"] is not None:
            log_std, V = self._low_rank(entries)
            return mu, torch.cat([torch.diag_embed(log_std.exp()), V], -1)
        L = entries.new_zeros(len(u), self.num_experts**2).index_copy_(1, self.lower, entries).unflatten(1, (self.num_experts, -1))
        torch.diagonal(L, dim1=-2, dim2=-1).exp_()
        return mu, L

    def divergence(self, u):
        prior = self.options["prior_std"]
        if self.options["rank"] is not None:
            mu, entries = self._parts(u)
            log_std, V = self._low_rank(entries)
            return maths.kl_low_rank(mu / prior, log_std - math.log(prior), V / prior)
        mu, L = self.moments(u)
        return maths.kl_cholesky(mu / prior, L / prior)


# ---- selection space ------------------------------------------------------------------------------------------------
class Temperature(Family):
    """K experts drawn without replacement from ``softmax(l / T)`` at one global temperature; nothing is learned."""

    defaults = {"temperature": 1.0}
    selects = True

    def build(self, temperature: float) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} is not a number >= 0")

    def temperature(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """``T [n, 1]``."""
        return u.new_full((len(u), 1), float(self.options["temperature"]))


class VariationalTemperature(Temperature):
    """A temperature for every token, ``T(u)`` (VTSR).

    As published (``temperature_prior=None``): ``T = softplus(net(u))`` and the regulariser ``-log T``. That is no divergence:
    it has no minimum, so T is held by the balance of two slopes alone. ``temperature_prior=(T0, sigma)`` is the stable
    variant: ``q(log T|u) = N(m(u), s^2(u))``, prior ``N(log T0, sigma^2)``, their exact KL, T sampled in training
    and ``exp m(u)`` at inference.
    """

    defaults = {"temperature": 1.0, "trunk": None, "temperature_prior": None}

    def build(self, temperature, trunk, temperature_prior) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}, where training starts, is not positive")
        if temperature_prior is not None and not (len(temperature_prior) == 2 and min(temperature_prior) > 0):
            raise ValueError(f"temperature_prior={temperature_prior!r} is not a pair of positive numbers (T0, sigma) or None")
        self.trunk = _trunk(self.width, trunk)
        hidden = self.trunk[0].out_features
        if temperature_prior is None:  # softplus(bias) = temperature
            self.net = _head(hidden, 1, temperature + math.log(-math.expm1(-temperature)))
        else:
            self.net = _head(hidden, 2, torch.tensor([math.log(temperature), math.log(temperature_prior[1]) - 1]))

    def _log_temperature(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.net(self.trunk(u))
        if self.options["temperature_prior"] is None:
            return nn.functional.softplus(out).clamp(min=torch.finfo(u.dtype).tiny).log(), None
        return out[:, :1], out[:, 1:]

    def temperature(self, u, generator):
        mean, log_std = self._log_temperature(u)
        if self.training and log_std is not None:
            mean = mean + log_std.exp() * _randn(generator, *mean.shape, like=mean)
        return mean.exp()

    def divergence(self, u):
        mean, log_std = self._log_temperature(u)
        if log_std is None:
            return -mean[:, 0]
        T0, sigma = self.options["temperature_prior"]
        return maths.kl_normal(mean, log_std, math.log(T0), sigma)[:, 0]


FAMILIES = {
    "deterministic": Family,
    "mcdropout": MCDropout,
    "swag": Swag,
    "ensemble": Ensemble,
    "laplace": Laplace,
    "mfvr": MeanField,
    "fcvr": FullCovariance,
    "temperature": Temperature,
    "vtsr": VariationalTemperature,
}
