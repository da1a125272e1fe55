"""Fitting the Bayesian routers on a task's answers: one loop, and what each method makes of it.

    loss = mean_items -log p(y | x) + beta * sum_layers mean_tokens divergence(u)        (arXiv 2603.09453; real tokens only)

with one sample a pass. MC dropout, SWAG and ensembles have no divergence; the Laplace router is fitted by one pass of
curvature; deterministic and fixed-temperature routers have nothing to fit. Only the routers' own parameters get gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from ..experts import curvature
from ..experts.capture import capturing
from ..models.checkpoint import Checkpoint, optimizer_state, restore_optimizer
from ..models.files import model_fingerprint
from ..models.modes import frozen
from ..models.readout import option_logits
from ..models.training import answer_nll
from ..progress import track
from ..storage import fingerprint
from .maths import SwagMoments

if TYPE_CHECKING:
    from .attach import Routers

# What a method's fit takes besides the loop's options. `tail`: the share of the steps SWAG collects over; `member_noise`: where
# ensemble members start, as a share of the router weight's root mean square; `prior_grid`: precisions tried on the validation set.
METHOD_OPTIONS = {
    "swag": {"tail": 0.5},
    "ensemble": {"member_noise": 0.01},
    "laplace": {"fisher": "exact", "token_setting": "expand", "rank": None, "prior_grid": tuple(10.0**k for k in range(-2, 7))},
}


def fit_routers(
    routers: Routers,
    train_loader: Iterable[Mapping[str, Tensor]],
    val_loader: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    beta: float = 0.01,
    lr: float = 1e-4,
    epochs: int = 3,
    weight_decay: float = 0.0,
    accumulation: int = 1,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    **method_options,
) -> list[dict]:
    """Fits in place and returns the history: a dict an epoch (``member``, ``epoch``, ``nll``, ``divergence``, ``val_nll``, nats, and ``signals``, their means on the validation set).

    AdamW, cosine with 5% warm-up (constant after it for SWAG, whose tail must move), gradients of ``accumulation`` batches
    per step. With ``val_loader`` the state of least validation NLL is kept, and ``patience`` epochs without a better one end
    the run. Loaders must be re-iterable; batches come in an order drawn from ``seed``. A fit that fails puts the
    previous state back. ``checkpoint``: a folder that holds the fit's state after every epoch; the same call goes on from there,
    bit for bit as if it had not been cut short, and removes it at the end (the Laplace fit is a single pass, and starts over).
    ``ValueError`` on bad options, no batch, items without labels, or a ``checkpoint`` that is damaged or another fit's (which is left
    alone), before anything has changed.
    """
    routers._check_attached()
    options = {**METHOD_OPTIONS.get(routers.method, {})}
    if unknown := set(method_options) - set(options):
        raise ValueError(f"fitting {routers.method!r} takes no option {sorted(unknown)[0]!r}; its own: {', '.join(options) or 'none'}")
    options |= method_options
    loop = {"beta": beta, "lr": lr, "epochs": epochs, "weight_decay": weight_decay, "accumulation": accumulation}
    _check(loop | {"patience": patience} | options)
    _check_loader("train_loader", train_loader)
    if val_loader is not None:
        _check_loader("val_loader", val_loader)
    before = {k: v.detach().clone() for k, v in routers.families.state_dict().items()}
    key = {"method": routers.method, "options": routers.options, "layers": routers.layers, "inference": routers.inference,
           "num_samples": routers.num_samples, "seeds": [routers.seed, seed], "fit": loop | options | {"patience": patience},
           "model": model_fingerprint(routers.model), "start": model_fingerprint(routers.families),
           "data": [_data_fingerprint(train_loader), val_loader and _data_fingerprint(val_loader)]} if checkpoint else {}
    state = Checkpoint(checkpoint, key)
    history: list[dict] = []
    try:
        with frozen(routers.model):
            match routers.method:
                case "deterministic" | "temperature":
                    pass
                case "laplace":
                    history = _fit_laplace(routers, train_loader, val_loader, seed, progress, **options)
                case _:
                    members = routers.options["members"] if routers.method == "ensemble" else 1
                    if routers.method == "ensemble":
                        _spread_members(routers, options["member_noise"], seed)
                    if resumed := state.load():
                        history[:] = resumed[0]["history"]
                        routers.restore(_under("routers.", resumed[1]))
                    for member in range(history[-1]["member"] if history else 0, members):
                        routers.activate(member)
                        _train(routers, train_loader, val_loader, **loop, patience=patience, seed=seed, member=member,
                               tail=options.get("tail"), history=history, checkpoint=state, progress=progress)
                    state.remove()
    except BaseException:
        routers.restore(before)
        raise
    finally:
        routers.activate(0)
        routers.stream(0)
        routers.eval()
        for p in routers.parameters():
            p.grad = None
    routers.fitted = {**loop, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}, "seed": seed, "history": history}
    return history


def _data_fingerprint(loader: Iterable[Mapping[str, Tensor]]) -> str:
    return fingerprint([[batch["input_ids"].tolist(), batch["option_ids"].tolist(), batch["labels"].tolist()] for batch in loader])


def _check(options: Mapping) -> None:
    rules = {"beta": (lambda x: 0 <= x < math.inf, "at least 0"), "lr": (lambda x: 0 < x < math.inf, "positive"),
             "epochs": (lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1"),
             "accumulation": (lambda x: isinstance(x, int) and x >= 1, "a whole number of at least 1"),
             "patience": (lambda x: x is None or x >= 1, "None or at least 1"),
             "weight_decay": (lambda x: x >= 0, "at least 0"), "tail": (lambda x: 0 < x <= 1, "in (0, 1]"),
             "member_noise": (lambda x: x >= 0, "at least 0"), "rank": (lambda x: x is None or x >= 1, "None or at least 1"),
             "fisher": (lambda x: x in ("exact", "mc", "empirical"), "one of 'exact', 'mc', 'empirical'"),
             "token_setting": (lambda x: x in ("expand", "active"), "one of 'expand', 'active'"),
             "prior_grid": (lambda x: len(x) > 0 and min(x) > 0, "positive precisions")}
    for name, value in options.items():
        fine, rule = rules[name]
        if not fine(value):
            raise ValueError(f"{name}={value!r} must be {rule}")


def _check_loader(name: str, loader: Iterable[Mapping[str, Tensor]]) -> None:
    if iter(loader) is loader:
        raise ValueError(f"{name} can be gone through only once; give a list of batches or a DataLoader")
    empty = True
    for number, batch in enumerate(loader):
        empty = False
        if (batch["labels"] < 0).any():
            raise ValueError(f"{name}: batch {number} has items without a label")
    if empty:
        raise ValueError(f"{name} gave no batch: there is nothing to fit on")


# ---- the loop -------------------------------------------------------------------------------------------------------
def _train(routers: Routers, train_loader, val_loader, *, beta: float, lr: float, epochs: int, weight_decay: float, accumulation: int,
           patience: int | None, seed: int, member: int, tail: float | None, history: list[dict], checkpoint: Checkpoint,
           progress: bool) -> None:
    batches = list(train_loader)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=lr, weight_decay=weight_decay)
    per_epoch = math.ceil(len(batches) / accumulation)
    steps = epochs * per_epoch
    warm_up = round(0.05 * steps)
    schedule = (get_cosine_schedule_with_warmup(optimizer, warm_up, steps) if tail is None
                else get_constant_schedule_with_warmup(optimizer, warm_up))
    collector = None if tail is None else _SwagCollector(routers, steps, tail)
    keeps_best = val_loader is not None and collector is None  # SWAG is its whole trajectory, not one point of it
    best_state = {}
    mine = lambda: [row for row in history if row["member"] == member]  # noqa: E731
    if mine():  # this member had begun: the state on disk is the one after its last epoch
        values, tensors = checkpoint.load()
        restore_optimizer(optimizer, values["optimizer"], _under("optimizer.", tensors))
        schedule.load_state_dict(values["schedule"])
        best_state = _under("best.", tensors)
        if collector is not None:
            collector.restore(values["collected"], _under("swag.", tensors))
    title = f"{routers.method} routers" + (f", member {member + 1}" if routers.method == "ensemble" else "")
    epoch_numbers = range(len(mine()) + 1, epochs + 1)
    for epoch in track(epoch_numbers, f"{title} (epochs)", progress, total=epochs, initial=epochs - len(epoch_numbers)):
        if _ended(mine(), patience):
            break
        routers.train()
        routers.stream(1 + epoch + 100_003 * (member + 101 * seed))  # not the noise of the predictions, nor the last epoch's
        nll_sum = charge_sum = items = 0.0
        # a function of seed, member and epoch: a resumed fit takes the same batches
        generator = torch.Generator().manual_seed((seed * 1009 + member) * 10_007 + epoch)
        order = torch.randperm(len(batches), generator=generator).tolist()
        for step, start in enumerate(range(0, len(order), accumulation), (epoch - 1) * per_epoch + 1):
            group = [batches[i] for i in order[start : start + accumulation]]
            size = sum(len(b["labels"]) for b in group)
            for batch in group:
                nll = answer_nll(option_logits(routers.model, batch), batch["labels"])
                charge = routers.divergence().to(nll)
                loss = (nll + beta * charge) * (len(batch["labels"]) / size)  # a mean over the group's items
                if not loss.isfinite():
                    raise ValueError(f"{title}: the loss is {loss.item()} in epoch {epoch}; the previous state is back")
                if loss.requires_grad:
                    loss.backward()
                nll_sum += float(nll.detach()) * len(batch["labels"])
                charge_sum += float(charge.detach()) * len(batch["labels"])
                items += len(batch["labels"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if collector is not None:
                collector.after(step)
        row = {"member": member, "epoch": epoch, "nll": nll_sum / items, "divergence": charge_sum / items, "val_nll": None, "signals": {}}
        if keeps_best:
            row["val_nll"], row["signals"] = validate(routers, val_loader, member)
            if row["val_nll"] < min((r["val_nll"] for r in mine()), default=math.inf):
                best_state = {k: v.detach().clone() for k, v in routers.families.state_dict().items()}
        history.append(row)
        groups, slots = optimizer_state(optimizer)
        collected, moments = (None, {}) if collector is None else collector.state()
        parts = {"routers.": routers.families.state_dict(), "best.": best_state, "optimizer.": slots, "swag.": moments}
        checkpoint.save({"history": history, "optimizer": groups, "schedule": schedule.state_dict(), "collected": collected},
                        {prefix + k: v for prefix, part in parts.items() for k, v in part.items()})
    if best_state:
        routers.restore(best_state)
    if collector is not None:
        collector.finish()
        if val_loader is not None:
            history[-1]["val_nll"], history[-1]["signals"] = validate(routers, val_loader)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _ended(rows: list[dict], patience: int | None) -> bool:
    """Whether ``patience`` epochs have gone by without a better validation NLL."""
    if patience is None or not rows or rows[0]["val_nll"] is None:
        return False
    return len(rows) - 1 - min(range(len(rows)), key=lambda i: rows[i]["val_nll"]) >= patience


def validate(routers: Routers, loader: Iterable[Mapping[str, Tensor]], member: int | None = None) -> tuple[float, dict[str, float]]:
    """Mean NLL of the answers as these routers would give them (nats per item), and the mean of every signal; of one
    ``member`` alone, for an ensemble."""
    routers.eval()
    alone = member is not None and routers.method == "ensemble"
    total, items, inference, active = 0.0, 0, routers.inference, getattr(routers.families[0], "active", 0)
    signals: dict[str, float] = {}
    routers.stream(0)
    try:
        if alone:  # a pass of one sample is the active member's
            routers.inference = "whole-model"
            routers.activate(member)
        with torch.no_grad():
            for batch in loader:
                p = option_logits(routers.model, batch).softmax(-1) if alone else routers(batch)
                picked = p.cpu().double().gather(1, batch["labels"].cpu()[:, None])
                total -= float(picked.clamp(min=1e-300).log().sum())
                items += len(batch["labels"])
                for name, value in routers.signals().items():
                    signals[name] = signals.get(name, 0.0) + float(value.sum())
    finally:
        routers.inference = inference
        routers.activate(active)
    return total / items, {name: value / items for name, value in signals.items()}


# ---- what single methods need ---------------------------------------------------------------------------------------
class _SwagCollector:
    """Takes the weights along the tail of the steps, about twice as often as deviations are kept, and leaves their moments."""

    def __init__(self, routers: Routers, steps: int, tail: float):
        self.families = routers.families
        self.first = steps - max(2, round(tail * steps))
        self.every = max(1, (steps - self.first) // (2 * routers.options["rank"]))
        self.moments = [SwagMoments.like(f.delta.detach(), routers.options["rank"]) for f in self.families]

    def after(self, step: int) -> None:
        if step > self.first and (step - self.first) % self.every == 0:
            for family, moments in zip(self.families, self.moments, strict=True):
                moments.update(family.delta.detach().clone())

    def state(self) -> tuple[int, dict[str, Tensor]]:
        """How many points have been taken, and the moments' tensors by name."""
        parts = {f"{i}.{name}": value for i, m in enumerate(self.moments)
                 for name, value in {"mean": m.mean, "square": m.square,
                                     **{f"deviation{j:03d}": d for j, d in enumerate(m.deviations)}}.items()}
        return self.moments[0].count, parts

    def restore(self, count: int, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what :meth:`state` gave."""
        for i, moments in enumerate(self.moments):
            own = {k: v.to(moments.mean) for k, v in _under(f"{i}.", tensors).items()}
            moments.count, moments.mean, moments.square = count, own["mean"], own["square"]
            moments.deviations = [own[k] for k in sorted(own) if k.startswith("deviation")]

    def finish(self) -> None:
        for family, moments in zip(self.families, self.moments, strict=True):
            family.mean, family.variance, family.low_rank = moments.mean, moments.variance, moments.matrix()


def _spread_members(routers: Routers, noise: float, seed: int) -> None:
    """Members start at different points around the model's router."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for family in routers.families:
            spread = noise * family.weight.square().mean().sqrt()
            for member in family.members:
                member.copy_(spread * torch.randn(member.shape, generator=generator, dtype=member.dtype).to(spread.device))


def router_gradients(routers: Routers, batch: Mapping[str, Tensor], columns) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Class logits ``f [B, C]``, and per attached layer the router inputs ``u [n, d]`` of the real tokens with ``g [K, n, E] =
    d <v_k, f> / d l``, ``v = columns(f) [K, B, C]``. Only inside :func:`capture.capturing`, with deterministic routing."""
    routers.tape = []
    try:
        f = option_logits(routers.model, batch)
        captured = sorted(routers.tape, key=lambda x: x[0])
        if [layer for layer, *_ in captured] != list(range(len(routers.layers))):
            raise RuntimeError("a router did not run exactly once in this forward pass; its gradient cannot be taken")
        logits = [l for *_, l in captured]
        v = columns(f.detach())
        grads = [torch.autograd.grad(f, logits, v_k, retain_graph=k + 1 < len(v), materialize_grads=True) for k, v_k in enumerate(v)]
    finally:
        routers.tape = None
    real = batch["attention_mask"].bool().flatten()
    rows = [real.to(l.device) for l in logits]
    return f.detach(), [(u[r], torch.stack([g[i][r] for g in grads])) for i, ((_, u, _), r) in enumerate(zip(captured, rows, strict=True))]


def _fit_laplace(routers: Routers, train_loader, val_loader, seed: int, progress: bool, *, fisher: str, token_setting: str,
                 rank: int | None, prior_grid: tuple[float, ...]) -> list[dict]:
    """Kronecker factors ``A = sum u u^T``, ``G = sum_k g g^T`` of every router from the *task*'s likelihood, ``H ~ G (x) A / n``.

    ``expand``: every real token is a sample; ``active``: those with a gradient (the last layer's others have none, yet under
    ``expand`` count in A and n). The prior precision is the one of ``prior_grid`` with least validation NLL, if there is a
    validation set, else as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = [[torch.zeros(f.width, f.width).to(f.alpha), torch.zeros_like(f.basis_g), 0] for f in routers.families]
    routers.eval()
    with capturing(routers.model):
        for number, batch in enumerate(track(train_loader, "Laplace routers: curvature", progress)):
            columns = lambda f: curvature.fisher_columns(f, fisher, batch["labels"].to(f.device), generator)  # noqa: E731, B023
            _, captured = router_gradients(routers, batch, columns)
            for layer, (u, g) in enumerate(captured):
                if not (u.isfinite().all() and g.isfinite().all()):
                    raise ValueError(f"batch {number}, router {routers.layers[layer]!r}: a non-finite input or gradient")
                if token_setting == "active":
                    active = (g != 0).any(2).any(0)
                    u, g = u[active], g[:, active]
                g = g.flatten(0, 1)
                sums[layer][0] += u.mT @ u
                sums[layer][1] += g.mT @ g
                sums[layer][2] += len(u)
    for family, (A, G, n) in zip(routers.families, sums, strict=True):
        (alpha, basis_a), (gamma, basis_g) = curvature.eigh(A), curvature.eigh(G)
        if rank is not None:
            alpha, basis_a = alpha[-rank:], basis_a[:, -rank:]
        family.alpha, family.basis_a = alpha.clamp(min=0), basis_a.contiguous()
        family.gamma, family.basis_g = gamma.clamp(min=0), basis_g
        family.count = torch.full_like(family.count, max(n, 1))
    if val_loader is None:
        return []
    history = []
    for precision in prior_grid:
        for family in routers.families:
            family.precision = torch.full_like(family.precision, precision)
        history.append({"prior_precision": precision, **dict(zip(("val_nll", "signals"), validate(routers, val_loader), strict=True))})
    best = min(history, key=lambda row: row["val_nll"])["prior_precision"]
    for family in routers.families:
        family.precision = torch.full_like(family.precision, best)
    return history
