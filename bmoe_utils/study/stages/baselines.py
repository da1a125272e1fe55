"""The baselines' predictions; what each of them is, is in :mod:`bmoe_utils.study.comparison`."""

from __future__ import annotations

from ...scores.predictions import Predictions
from .. import comparison
from .map_model import MapModel


class Baselines(MapModel):
    """Stage 3, beside the experts' posterior."""

    def baseline_predictions(self, seed: int, name: str, split: str = "test", *, items: int | None = None, size: int | None = None,
                             **options) -> Predictions:
        """Predictions of a baseline (:data:`comparison.NAMES`) on a split (its first ``items``), fitted as the seed's MAP model is, on
        its fine-tuning set of ``size`` items. ``options``: other settings than those of :func:`comparison.settings`."""
        run = comparison.Run(self, seed, name, comparison.settings(self, name, options), size)
        return self.predictions("baseline", split, run.key | {"options": run.options}, run.predictor, items=items,
                                batch_size=self.router_batch)
