"""One question under both posteriors, interactively: move the experts' prior precision and the number of routings, watch the answer.

All that a slider asks for is tabulated once a question: under each of S routings the class logits' mean, and their covariance at
every point of a grid of prior precisions (one forward and C backward passes a routing; the Jacobians are the same for all points).
Moving a slider then mixes small matrices. The same numbers as :class:`JointPosterior` gives, and without a browser the same figures.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from ..data.tasks import Split
from ..joint import information
from ..joint.posterior import SAMPLES, JointPosterior
from ..models.readout import option_logits
from .plots import NOTE, legend_outside
from .plots.comparison_plots import PARTS, question_panel

# Factors of the tuned prior precision: half decades, a thousandth to a thousandfold.
FACTORS = tuple(float(f"{10 ** (i / 2):.4g}") for i in range(-6, 7))
KEPT = 16  # questions whose tables are kept


@dataclass(frozen=True)
class Answer:
    """What is known of one question of C options: ``probs`` and ``map_probs [C]``, the ``parts`` of the uncertainty in nats."""

    probs: np.ndarray
    map_probs: np.ndarray
    parts: dict[str, float]


class Explorer:
    """Looks at single questions under a :class:`JointPosterior`.

    Args:
        joint: its routers stay attached; they are left as they were after every question.
        loader: ``items -> iterable of batches``, such as ``study.loader``. splits: name -> :class:`Split` to pick from.
        tokenizer: to name the words of a typed question that the model has never seen.
        factors: of the experts' prior precision as it is now, ascending, with 1 among them. routings: the most routings to look at,
            by default the routers' own number. num_samples: of the logits under each.
    """

    def __init__(self, joint: JointPosterior, loader: Callable, splits: Mapping[str, Split], *, tokenizer=None,
                 factors: Sequence[float] = FACTORS, routings: int | None = None, num_samples: int = SAMPLES):
        if list(factors) != sorted(factors) or 1.0 not in factors:
            raise ValueError(f"factors must ascend and hold 1, got {list(factors)}")
        if not splits or not all(len(items) for items in splits.values()):
            raise ValueError("an explorer needs at least one split, and none of them empty")
        self.joint, self.loader, self.splits, self.tokenizer = joint, loader, dict(splits), tokenizer
        self.factors, self.num_samples = tuple(factors), num_samples
        if routings is not None and joint.routers.method not in ("deterministic", "ensemble"):
            joint.routers.num_samples = routings
        self.routings = joint.num_routings
        self._tables: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(cls, study, seed: int, *, options: Mapping | None = None, **which) -> Explorer:
        """The explorer of ``study.joint(seed, **which)`` over the study's test questions; ``options``: those of the class."""
        splits = {name: study.task[name] for name in ("test", *study.shifts)}
        return cls(study.joint(seed, **which), lambda items: study.loader(items, batch_size=1), splits,
                   tokenizer=study.tokenizer, **dict(options or {}))

    # ---- numbers ----------------------------------------------------------------------------------------------------
    def item(self, split: str, index: int) -> dict:
        """A question of a split; ``ValueError`` on one that is not there."""
        if split not in self.splits or not 0 <= index < len(self.splits[split]):
            raise ValueError(f"no question {index} in {split!r}; there are: " + ", ".join(f"{k} 0 to {len(v) - 1}" for k, v in self.splits.items()))
        return self.splits[split][index]

    def typed(self, question: str, choices: str | Sequence[str]) -> dict:
        """A question of one's own, its options a list or parted by ``|``; ``ValueError`` where the model cannot read it out."""
        choices = [c.strip() for c in (choices.split("|") if isinstance(choices, str) else choices)]
        choices = [c for c in choices if c]
        if not question.strip():
            raise ValueError("there is no question: write one")
        if not 2 <= len(choices) <= information.OPTIONS:
            raise ValueError(f"{len(choices)} options; give 2 to {information.OPTIONS}, parted by |")
        item = {"id": "typed", "question": question.strip(), "choices": choices, "answer": None}
        self._batch(item)
        return item

    def unknown_words(self, question: str) -> list[str]:
        """Words that are one and the same unknown token to the model (none, to a tokenizer of bytes)."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return [] if unknown is None else [w for w in question.split() if unknown in self.tokenizer.encode(f" {w}", add_special_tokens=False)]

    def _batch(self, item: Mapping) -> dict[str, Tensor]:
        readout = next(iter(self.splits.values())).readout
        return next(iter(self.loader(Split([item], readout))))

    def _table(self, item: Mapping) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``[S, 1, C]``, covariances ``[Q, S, 1, C, C]`` at every factor, and the MAP model's logits ``[C]``, of one question."""
        key = repr((item["question"], item.get("passage"), item["choices"]))
        if key not in self._tables:
            batch = self._batch(item)
            means, covs = (x.cpu() for x in self.joint.predictive_logits(batch, self.factors))
            while len(self._tables) >= KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = means, covs, self._map_logits(batch)
        return self._tables[key]

    def _map_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of the model without its Bayesian routers, ``[C]``: their forwards stand aside for one pass."""
        modules, before = self.joint.routers._modules, self.joint.routers._before
        attached = [vars(m).pop("forward") for m in modules]
        try:
            for module, forward in zip(modules, before, strict=True):
                if forward is not None:
                    module.forward = forward
            with torch.no_grad():
                return option_logits(self.joint.laplace.model, batch)[0].cpu()
        finally:
            for module, forward in zip(modules, attached, strict=True):
                module.forward = forward

    def answer(self, item: Mapping, factor: float = 1.0, routings: int | None = None) -> Answer:
        """With the experts' prior precision times ``factor`` (one of ``factors``), over the first ``routings`` (by default all)."""
        routings = self.routings if routings is None else routings
        if factor not in self.factors:
            raise ValueError(f"factor {factor} is not one of {', '.join(f'{f:g}' for f in self.factors)}")
        if not 1 <= routings <= self.routings:
            raise ValueError(f"routings={routings} must lie between 1 and {self.routings}")
        means, covs, plain = self._table(item)
        points = information.normal_points(self.num_samples, means.shape[-1], self.joint.laplace.options["seed"])
        probs, parts = information.averaged_answer(means[:routings], covs[self.factors.index(factor), :routings], points)
        named = {"total": parts.total, "aleatoric": parts.aleatoric, "expert": parts.expert, "routing": parts.routing}
        return Answer(probs[0].numpy(), plain.double().softmax(-1).numpy(), {k: float(v) for k, v in named.items()})

    # ---- figures ----------------------------------------------------------------------------------------------------
    def panel(self, item: Mapping, factor: float = 1.0, routings: int | None = None):
        """The question's figure at one setting: :func:`comparison_plots.question_panel`."""
        said = self.answer(item, factor, routings)
        fig, axes = plt.subplots(2, 1, figsize=(9.5, 2.6 + 0.5 * len(item["choices"])), height_ratios=[len(item["choices"]), 1])
        question_panel(item["choices"], said.probs, axes, reference=said.map_probs, p_star=item.get("p_star"), answer=item.get("answer"),
                       parts=said.parts, title=item["question"])
        return fig

    def sweep(self, item: Mapping):
        """What the sliders would show, at once: probabilities and parts against the prior precision, and parts against routings."""
        by_factor = [self.answer(item, factor) for factor in self.factors]
        numbers = sorted({1, *range(2, self.routings + 1, max(1, self.routings // 8)), self.routings})
        by_number = [self.answer(item, routings=number) for number in numbers]
        fig, axes = plt.subplots(1, 3, figsize=(17, 4.2))
        for option, text in enumerate(item["choices"]):
            right = option == item.get("answer")
            axes[0].plot(self.factors, [said.probs[option] for said in by_factor], marker="osD^vPX<>"[option % 9], markeredgecolor="white",
                         linewidth=3 if right else 1.5, label=f"{text}{' (labelled)' * right}")  # fmt: skip
        axes[0].set(xscale="log", xlabel="Prior precision / tuned", ylabel="Probability", ylim=(0, 1))
        axes[0].axvline(1, color=NOTE, linestyle="--", linewidth=1.2)
        axes[0].legend(loc="upper left", ncols=1 + (len(item["choices"]) > 4), fontsize="small")
        for ax, x, said in ((axes[1], self.factors, by_factor), (axes[2], numbers, by_number)):
            bands = [[s.parts[name] for s in said] for name in PARTS]
            ax.stackplot(x, bands, colors=[colour for _, colour in PARTS.values()], labels=[label for label, _ in PARTS.values()])
            ax.set(ylim=(0, np.log(len(item["choices"]))), ylabel="Uncertainty (nats)", xlim=(x[0], x[-1] if len(x) > 1 else x[0] + 1))
        axes[1].set(xscale="log", xlabel="Prior precision / tuned")
        axes[2].set(xlabel="Routings S")
        legend_outside(axes[2])
        return fig

    # ---- widgets ----------------------------------------------------------------------------------------------------
    def widget(self, split: str | None = None, index: int = 0):
        """An ``ipywidgets`` box, with its controls as ``box.controls`` (by name); whatever a control is set to, the picture follows."""
        import ipywidgets as w

        split = split or next(iter(self.splits))
        self.item(split, index)
        wide = w.Layout(width="620px")
        names = {"description_width": "130px"}
        c = {
            "split": w.Dropdown(options=list(self.splits), value=split, description="Questions from", style=names),
            "index": w.BoundedIntText(value=index, min=0, max=len(self.splits[split]) - 1, description="Number", style=names),
            "question": w.Text(description="or your own", placeholder="a question, then Enter", continuous_update=False, style=names, layout=wide),
            "choices": w.Text(description="Options", placeholder="one | another | a third", continuous_update=False, style=names, layout=wide),
            "factor": w.SelectionSlider(options=[(f"{f:g}", f) for f in self.factors], value=1.0, description="Prior precision ×",
                                        continuous_update=False, style=names, layout=wide),
            "routings": w.IntSlider(value=self.routings, min=1, max=self.routings, description="Routings S", continuous_update=False,
                                    style=names, layout=wide),
        }  # fmt: skip
        picture, note = w.Image(format="png", layout=w.Layout(max_width="950px")), w.HTML()
        box = w.VBox([w.HBox([c["split"], c["index"]]), c["question"], c["choices"], c["factor"], c["routings"], note, picture])
        box.controls, box.picture, box.note = c, picture, note

        def draw(*_) -> None:
            """On bad input the picture stays as it was, and the note says why."""
            try:
                own = c["question"].value.strip()
                item = self.typed(own, c["choices"].value) if own else self.item(c["split"].value, c["index"].value)
                fig = self.panel(item, c["factor"].value, c["routings"].value)
            except ValueError as error:
                note.value = f"<b>{_escaped(error)}</b>"
                return
            said, buffer = self.answer(item, c["factor"].value, c["routings"].value), io.BytesIO()
            fig.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
            plt.close(fig)
            picture.value = buffer.getvalue()
            top = int(said.probs.argmax())
            epistemic = (said.parts["expert"] + said.parts["routing"]) / max(said.parts["total"], 1e-12)
            unknown = self.unknown_words(own)
            note.value = _escaped(f"{item['choices'][top]}: {said.probs[top]:.1%} (MAP {said.map_probs[top]:.1%}); of "
                                  f"{said.parts['total']:.2f} nats of uncertainty {epistemic:.0%} are the model's own"
                                  + f". Words unknown to the model: {', '.join(unknown)}" * bool(unknown))

        def limit(change) -> None:
            c["index"].max = len(self.splits[change["new"]]) - 1  # a larger value is clipped, which draws
            draw()

        c["split"].observe(limit, "value")
        for name in ("index", "question", "choices", "factor", "routings"):
            c[name].observe(draw, "value")
        draw()
        return box

    def show(self, split: str | None = None, index: int = 0):
        """:meth:`widget`, for the end of a cell, which displays it; in a batch run (``BMOE_BATCH``), where nobody moves it, None."""
        return self.widget(split, index) if os.environ.get("BMOE_BATCH", "0") in ("", "0") else None


def _escaped(text) -> str:
    return str(text).replace("&", "&amp;").replace("<", "&lt;")
