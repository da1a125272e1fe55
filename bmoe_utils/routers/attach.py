"""Bayesian routers on any transformers MoE model: attaching, inference, signals, files. The methods are in
``families``, each architecture's own top-K rule in ``rules``, training in ``fit``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.files import CheckedFolder, model_fingerprint
from ..models.layers import select_layers, unwrap
from ..models.readout import option_logits
from ..precision import float64
from . import maths
from .families import FAMILIES
from .rules import Rule, find_routers, linear_map

FILES = CheckedFolder("routers", format=2)
INFERENCE = ("inside", "whole-model")
SIGNALS = ("gate_entropy", "logit_variance", "mc_logit_variance", "temperature")


class Routers:
    """Bayesian routers attached to a model; made by :func:`attach_routers`, and a context manager that detaches.

    The model holds none of their parameters: its ``state_dict`` and fingerprint stay what they were. ``inference``:

    - ``inside``: every layer averages the routing scores of ``num_samples`` samples and selects once; one forward pass.
      ``num_samples=None``: without sampling, for Gaussian logits (:func:`maths.sample_free_shift`). The selection-space
      methods draw one selection.
    - ``whole-model``: one sample per layer and forward pass; calling this object averages the answers of ``num_samples`` passes.

    In eval mode the noise is a function of ``seed`` and the batch's real tokens, so the same batch gives the same answer,
    padded or not; in train mode (one sample a pass) it runs on. ``noise_scale`` multiplies every standard deviation (for
    selection: the temperature). Signals and divergences count real tokens only, by the attention mask the model is given.
    """

    def __init__(self, model: nn.Module, method: str, names: list[str], inference: str, num_samples: int | None, seed: int,
                 prior_mean: nn.Module | Mapping[str, Tensor] | None, options: dict):
        self.model, self.method, self.layers, self.inference = model, method, names, inference
        self.num_samples, self.seed, self.options = num_samples, seed, options
        self.noise_scale, self.training, self.fitted = 1.0, False, None
        self.tape: list | None = None  # the Laplace fit of :mod:`.fit` sets it
        routers = find_routers(model)
        self._modules = [routers[name] for name in names]
        self._before = [vars(m).get("forward") for m in self._modules]
        if any(isinstance(getattr(m, "__self__", None), _Attached) for m in self._before):
            raise ValueError("this model already has Bayesian routers; detach() them first")
        self._generators: dict[torch.device, torch.Generator] = {}
        self._pass, self._real, self._rows, self._records, self._charges, self._signals = 0, None, None, [], [], None
        forwards = [b or m.forward for b, m in zip(self._before, self._modules, strict=True)]
        self.rules = [Rule(model, *x) for x in zip(names, self._modules, forwards, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.families = nn.ModuleList(FAMILIES[method](rule.linear, **options) for rule in self.rules).eval()
        self.prior_mean = self._centre(prior_mean)
        averages = method not in ("deterministic", "temperature", "vtsr") and inference == "inside"
        for name, rule in zip(names, self.rules, strict=True):
            if averages and rule.link is None:
                raise ValueError(f"router {name!r} scores by neither softmax nor sigmoid: use inference='whole-model'")
            if self.families[0].selects and rule._all is None:
                raise ValueError(f"router {name!r} has no top_k that could be widened; method {method!r} cannot weigh its draws")
        self._handles, self._attached = [], True  # from here on the model is touched
        try:
            for i, module in enumerate(self._modules):
                module.forward = _Attached(self, i, forwards[i]).forward
            for m in {id(x): x for x in (model, unwrap(model))}.values():  # peft calls the inner forward past its hooks
                self._handles.append(m.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(m.register_forward_hook(self._leave, always_call=True))
        except BaseException:
            self.detach()
            raise

    def _centre(self, mean: nn.Module | Mapping[str, Tensor] | None) -> str:
        """Moves the prior mean from the model's routers to given ones, and says in a word which they are."""
        if mean is None:
            return "current"
        if isinstance(mean, nn.Module):
            given = {n: linear_map(m) for n, m in find_routers(mean).items()}
            weights, said = {n: m.weight.detach() for n, m in given.items()}, f"model {model_fingerprint(mean)[:12]}"
        else:
            given, weights, said = {}, mean, "weights"
        for name, family in zip(self.layers, self.families, strict=True):
            if name not in weights or weights[name].shape != family.weight.shape:
                wrong = f"has shape {tuple(weights[name].shape)}" if name in weights else f"is not among {', '.join(weights)}"
                raise ValueError(f"prior_mean: router {name!r} {wrong}; it must be {list(family.weight.shape)}, as in the model")
            family.mean_shift = weights[name].to(family.mean_shift) - family.weight
            if (bias := getattr(given.get(name), "bias", None)) is not None:
                theirs, own = (b.detach().to(family.bias_shift) for b in (bias, family.router.bias))
                family.bias_shift = theirs - own
        return said

    # ---- the model's side -----------------------------------------------------------------------------------------------
    def _enter(self, module: nn.Module, args: tuple, kwargs: Mapping) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        B, T = ids.shape[:2]
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"the attention mask must be [B, T] to tell real tokens from padding, not {tuple(mask.shape)}")
        real = torch.ones(B, T, dtype=torch.bool, device=ids.device) if mask is None else mask[:, -T:].bool()
        self._real, self._rows = real, None if bool(real.all()) else real.flatten().nonzero().squeeze(1)
        self._records, self._charges = [], []
        if not self.training:
            self._generators.clear()

    def _leave(self, module: nn.Module, args: tuple, output) -> None:
        if output is not None and self._records and len(self._records) == len(self.layers):
            self._signals = self._summarise(self._records)
        self._records, self._real, self._rows = [], None, None

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed + 1_000_003 * self._pass)
        return self._generators[device]

    def _route(self, layer: int, forward, hidden: Tensor, *args, **kwargs):
        family, rule = self.families[layer], self.rules[layer]
        outputs, hidden, logits = rule.run(forward, hidden, *args, **kwargs)
        if len(family.mean_shift):
            logits = logits + hidden.to(rule.dtype) @ family.mean_shift.mT
            logits = logits + family.bias_shift if len(family.bias_shift) else logits
            outputs = rule.pack(*rule(logits))
        if self.tape is not None:
            return self._capture(layer, hidden, logits)
        rows = None if self._rows is None else self._rows.to(logits.device)
        pick = (lambda x: x) if rows is None else (lambda x: x[rows])
        u, l = pick(hidden).to(rule.dtype), pick(logits)
        if self.training and self._real is not None and (charge := family.divergence(u)) is not None:
            self._charges.append(charge.mean())
        fill = (lambda x: x) if rows is None else (lambda x: logits.index_put((rows,), x))  # padding: as it was
        if self.method == "deterministic":
            self._record(layer, l)
        elif family.selects:
            generator = self._generator(u.device)
            T = self.noise_scale * family.temperature(u, generator)
            noisy = l + T * maths.gumbel_noise(l, generator)
            # In training the rule sees the noisy logits themselves: a Gumbel softmax, through which T has a gradient.
            outputs = rule.pack(*(rule(fill(noisy)) if self.training else rule.select(outputs, logits, fill(noisy))))
            self._record(layer, l, temperature=T[:, 0])
        else:
            shifted, signals = self._shifted(family, rule, u, l)
            outputs = rule.pack(*rule(fill(shifted)))
            self._record(layer, shifted, **signals)
        return outputs

    def _shifted(self, family, rule: Rule, u: Tensor, l: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The real tokens' logits after this method's offset, ``[n, E]``, and the signals it has."""
        scale, signals = self.noise_scale, {}
        gaussian = None if self.training or not self._wants_moments else family.moments(u)
        if gaussian is not None:
            signals["logit_variance"] = scale**2 * gaussian[1].flatten(1).square().sum(1)
        if self.inference == "inside" and self.num_samples is None and not self.training:
            centre, root = gaussian
            cov = scale**2 * (root.square() if root.dim() == 2 else root @ root.mT)
            mean = l + centre
            return mean + maths.sample_free_shift(mean, cov, rule.link), signals
        single = self.training or self.inference == "whole-model"
        samples = 1 if single else family.count_samples(self.num_samples)
        centre, deviations = family.offsets(u, samples, self._generator(u.device), gaussian)
        mean = l + centre
        if deviations is None:
            return mean, signals
        deviations = deviations if scale == 1 else scale * deviations
        if single:
            return mean + deviations[0], signals
        if rule.link is None:  # loaded for whole passes and switched since
            raise ValueError(f"router {self.layers[self.rules.index(rule)]!r} scores by neither softmax nor sigmoid: use inference='whole-model'")
        if len(deviations) > 1:  # about the known centre; tensor.var is thirty times as slow over the first axis
            signals["mc_logit_variance"] = deviations.detach().square().sum(0).sum(-1) / (len(deviations) - family.centred)
        return mean + maths.sampled_shift(mean, mean + deviations, rule.link), signals

    @property
    def _wants_moments(self) -> bool:
        return self.method in ("laplace", "mfvr", "fcvr") or self.num_samples is None

    def _capture(self, layer: int, hidden: Tensor, logits: Tensor):
        """For the Laplace fit: the logits stay in the graph, and a gradient with respect to them can be taken."""
        logits = logits if logits.requires_grad else logits.detach().requires_grad_()
        self.tape.append((layer, hidden.detach().to(logits.dtype), logits))
        return self.rules[layer].pack(*self.rules[layer](logits))

    # ---- signals ----------------------------------------------------------------------------------------------------
    def _record(self, layer: int, logits: Tensor, **signals: Tensor) -> None:
        if self._real is None or self.training:
            return
        log_p = logits.detach().log_softmax(-1)
        if self.rules[layer].link == "sigmoid":  # scores made a distribution
            log_p = maths.log_scores(logits.detach(), "sigmoid").log_softmax(-1)
        signals["gate_entropy"] = maths.entropy(log_p)
        self._records.append({k: v.detach() for k, v in signals.items()})  # left on their device: no layer waits for a copy

    def _summarise(self, records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        real, out = self._real.cpu(), {}
        for name in SIGNALS:
            if name not in records[0]:
                continue
            by_layer = []
            for record in records:
                full = torch.zeros(real.shape, dtype=torch.float64)
                full[real] = record[name].cpu().double()
                by_layer.append(full)
            mean = torch.stack(by_layer).mean(0)
            out[f"{name}_last"], out[f"{name}_mean"] = mean[:, -1], maths.masked_mean(mean, real)
        return out

    def signals(self) -> dict[str, Tensor]:
        """Uncertainty of each item of the last batch, float64 ``[B]``, averaged over the attached layers; higher = less sure.

        ``gate_entropy`` of the routing scores, ``logit_variance`` tr(Sigma) (Gaussian logits), ``mc_logit_variance`` (sampled
        inside), ``temperature``; each as ``.._last`` (the token that answers) and ``.._mean`` (over the real tokens). Whole-model
        inference adds ``answer_information``, the mutual information of answer and routing, in nats.
        """
        if self._signals is None:
            raise RuntimeError("no signals yet: they are of the last batch that went through the model in eval mode")
        return dict(self._signals)

    def divergence(self) -> Tensor:
        """Of the last pass in train mode: each layer's mean over real tokens, summed over the layers. 0-d, in the graph."""
        return torch.stack([c.to(self._charges[0].device) for c in self._charges]).sum() if self._charges else torch.zeros(())

    # ---- the caller's side --------------------------------------------------------------------------------------------
    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Probabilities ``[B, C]`` of the options; whole-model inference averages its passes, and their signals too."""
        self._check_attached()
        training, passes = self.training, 1
        if self.inference == "whole-model" and self.method != "deterministic":
            passes = self.families[0].count_samples(self.num_samples)
        self.eval()
        probs, signals = [], []
        try:
            with torch.no_grad():
                for self._pass in range(passes):
                    self.activate(self._pass)
                    probs.append(option_logits(self.model, batch).softmax(-1))
                    signals.append(self.signals())
        finally:
            self.stream(0)
            self.activate(0)
            self.train(training)
        self._signals = {k: torch.stack([s[k] for s in signals]).mean(0) for k in signals[0]}
        probs = torch.stack(probs)  # [S, B, C]
        mean = probs.mean(0)
        if len(probs) > 1:
            entropy = lambda p: maths.entropy(float64(p).log())  # noqa: E731
            self._signals["answer_information"] = (entropy(mean) - entropy(probs).mean(0)).clamp(min=0).cpu()
        return mean

    def stream(self, number: int) -> None:
        """Which stream of random numbers passes draw from now on (0: the one predictions use)."""
        self._pass = number
        self._generators.clear()

    def activate(self, member: int) -> None:
        """Which member of an ensemble trains, or answers in a pass of one sample."""
        for family in self.families:
            family.active = member

    def parameters(self) -> list[nn.Parameter]:
        """What training may change; nothing of the model's."""
        return list(self.families.parameters())

    def train(self, mode: bool = True) -> Routers:
        """In train mode a pass draws one sample (of what is trained) and keeps the divergences; eval mode predicts."""
        self.training = mode
        self.families.train(mode)
        return self

    def eval(self) -> Routers:
        return self.train(False)

    def fit(self, train_loader: Iterable, val_loader: Iterable | None = None, **options) -> Routers:
        """:func:`fit.fit_routers` of these routers."""
        from .fit import fit_routers
        fit_routers(self, train_loader, val_loader, **options)
        return self

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("these routers are detached from their model; attach new ones, or load saved ones")

    def detach(self) -> None:
        """Restores the model, bit for bit. The parameters stay here and can still be saved."""
        if not self._attached:
            return
        for module, before in zip(self._modules, self._before, strict=True):
            if before is None:
                vars(module).pop("forward", None)
            else:
                module.forward = before
        for handle in self._handles:
            handle.remove()
        self._attached = False

    def __enter__(self) -> Routers:
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts back a state of ``families.state_dict()``, or a part of it."""
        for name, tensor in state.items():
            owner, _, leaf = name.rpartition(".")
            module = self.families.get_submodule(owner)
            target = getattr(module, leaf)
            if isinstance(target, nn.Parameter):
                target.data.copy_(tensor)
            else:  # buffers may have grown with the fit
                setattr(module, leaf, tensor.to(target))

    # ---- files ------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Writes ``routers.safetensors`` and ``manifest.json``; whole or not at all, into a folder
        of theirs or an empty one, as :meth:`ExpertLaplace.save` does. ``ValueError`` where the folder
        holds anything but routers, ``OSError`` where it cannot be written; what is there is then as
        it was.
        """
        FILES.check_free(folder)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.families.state_dict().items()}
        values = {name: getattr(self, name) for name in
                  ("method", "layers", "inference", "num_samples", "seed", "prior_mean", "options", "fitted")}
        FILES.save_fitted(folder, tensors, values, self.model)

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module, *, method: str | None = None) -> Routers:
        """Attaches saved routers to the model they were fitted on; ``method``: the one the caller relies on.

        ``ValueError`` if the files are missing, damaged, of another format, method or model, or of
        something else (a posterior); the model is then untouched.
        """
        saved, tensors = FILES.load_fitted(folder, model)
        if method not in (None, saved["method"]):
            raise ValueError(f"{folder} holds routers of method {saved['method']!r}, not {method!r}")
        routers = attach_routers(model, saved["method"], layers=saved["layers"], inference=saved["inference"],
                                 num_samples=saved["num_samples"], seed=saved["seed"], **saved["options"])
        routers.restore(tensors)
        routers.fitted, routers.prior_mean = saved["fitted"], saved["prior_mean"]
        return routers


class _Attached:
    """What stands in for one router's forward: a bound method, so that a second attachment recognises the first."""

    def __init__(self, routers: Routers, layer: int, original):
        self.routers, self.layer, self.original = routers, layer, original

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        return self.routers._route(self.layer, self.original, hidden_states, *args, **kwargs)


def attach_routers(
    model: nn.Module,
    method: str,
    *,
    layers: str | Sequence[int | str] = "all",
    inference: str = "inside",
    num_samples: int | None = 35,
    seed: int = 0,
    prior_mean: nn.Module | Mapping[str, Tensor] | None = None,
    **options,
) -> Routers:
    """Puts Bayesian routers in front of a model's own, unfitted but ready to run. ``detach()`` takes them off again.

    ``method``: one of ``families.FAMILIES``, whose ``defaults`` are its ``options``. ``layers``: ``"all"``, ``"last:n"``, indices
    of the MoE layers, or router names. ``num_samples=None``: sample-free. ``prior_mean``: whose logits ``l_det`` are; None: the
    model's own routers (the MAP routers); another model of the same shape, for instance the pretrained one; or a weight ``[E, d]``
    for every router name, for instance of :func:`tune.tune_routers`. ``ValueError`` on anything unknown, and
    then the model is untouched.
    """
    if method not in FAMILIES:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, FAMILIES))}")
    if inference not in INFERENCE:
        raise ValueError(f"inference={inference!r} is not one of {', '.join(map(repr, INFERENCE))}")
    if unknown := set(options) - set(FAMILIES[method].defaults):
        known = ", ".join(FAMILIES[method].defaults) or "none"
        raise ValueError(f"method {method!r} has no option {sorted(unknown)[0]!r}; its options: {known}")
    if num_samples is None and (method not in ("laplace", "mfvr", "fcvr", "swag") or inference != "inside"):
        raise ValueError("num_samples=None (sample-free) is for Gaussian logits (laplace, mfvr, fcvr, swag) with inference='inside'")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise ValueError(f"num_samples={num_samples!r} must be a whole number of at least 1, or None")
    names = list(find_routers(model))
    if isinstance(layers, str) and layers.startswith("last:"):
        n = layers.removeprefix("last:")
        if not n.isdigit() or not 1 <= int(n) <= len(names):
            raise ValueError(f"layers={layers!r}: give 'last:n' with n from 1 to {len(names)}")
        layers = list(range(-int(n), 0))
    names, options = select_layers(names, layers), FAMILIES[method].defaults | options
    return Routers(model, method, names, inference, num_samples, seed, prior_mean, options)
