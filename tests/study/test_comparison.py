"""The baselines as a study's stages, at their smallest: computed once, on the same items as the MAP model, test never looked at."""

import numpy as np
import pytest
import torch
from test_study import TINY, small_world  # noqa: F401 - the fixture is autouse in a module that imports it

from bmoe_utils.models import training
from bmoe_utils.models.training import adapted_weights
from bmoe_utils.scores import predictions
from bmoe_utils.study import comparison, plots
from bmoe_utils.study.comparison import EITHER, NAMES, Run, settings
from bmoe_utils.study.output import Store
from bmoe_utils.study.stages import map_model
from bmoe_utils.study.study import Study

SMALL = TINY | {"layers": 2, "epochs": 3, "members": 2, "router_items": 12, "router_batch": 5, "mc_samples": 50}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("baselines"))


def tiny(store, **overrides):
    return Study("smoke", overrides=SMALL | overrides, store=store)


def run(s, name, **options):
    return Run(s, 0, name, settings(s, name, options), None)


def everything(s):
    full = [s.baseline_predictions(0, name, items=9) for name in EITHER]
    lora = s.regime("lora")
    near = lora.baseline_predictions(0, "swag", "near", scale=1.0)
    return full + [lora.baseline_predictions(0, name, items=9) for name in NAMES] + [near]


def test_every_baseline_says_its_own_and_a_second_study_computes_nothing(store, monkeypatch):
    first = everything(tiny(store))
    assert all(a.probs.shape != b.probs.shape or (a.probs != b.probs).any() for i, a in enumerate(first) for b in first[:i])
    assert all(len(p) == 9 and "answer_information" in p.signals for p in first[:-1])

    def fail(*_, **__):
        raise AssertionError("computed again")

    for owner, name in ((map_model, "predict"), (comparison.training, "fine_tune"), (comparison, "fit_blob"), (comparison, "fit_swag"),
                        (comparison, "largest_within")):
        monkeypatch.setattr(owner, name, fail)
    for a, b in zip(everything(tiny(store)), first, strict=True):
        assert np.array_equal(a.probs, b.probs)


def test_fits_are_shared_by_splits_and_by_what_only_predicts(store, monkeypatch):
    lora, fits = tiny(store).regime("lora"), []
    original = comparison.training.fine_tune
    monkeypatch.setattr(comparison.training, "fine_tune", lambda *a, **k: (fits.append(1), original(*a, **k))[1])
    for split, samples in (("test", 2), ("near", 2), ("near", 3)):
        lora.baseline_predictions(0, "mc_dropout", split, dropout=0.25, samples=samples)
    assert len(fits) == 1


def test_swag_and_blob_sample_with_the_spread_that_was_fitted(store):
    lora = tiny(store).regime("lora")

    def spread(name, **options):
        first, second = run(lora, name, samples=2, **options).predictor().states
        return max(float((first[k] - second[k]).abs().max()) for k in first)

    assert spread("swag", scale=0.0) == 0.0
    assert spread("swag", scale=2.0) == pytest.approx(2 * spread("swag", scale=0.5), rel=1e-4) and spread("swag", scale=2.0) > 0
    assert 0 < spread("blob", init=1e-3) < 0.5 * spread("blob")


def test_the_map_model_is_the_ensembles_first_member_and_the_last_checkpoint(store):
    s = tiny(store)
    for regime in (s, s.regime("lora")):
        own = {k: v.detach() for k, v in adapted_weights(regime.map_model(0)).items()}
        first, second = run(regime, "ensemble").predictor().states
        assert first.keys() == own.keys() == second.keys() and all(torch.equal(first[k], own[k]) for k in own)
        assert any(not torch.equal(second[k], own[k]) for k in own)
        checkpoints = run(regime, "checkpoint_ensemble", checkpoints=2).predictor().states
        assert len(checkpoints) == 2 and all(torch.equal(checkpoints[-1][k], own[k]) for k in own)
        model, after = regime.base()[0], []
        if regime.method == "lora":
            model = training.add_lora(model, seed=0)
        training.fine_tune(model, regime.loader(regime.train_items(0), batch_size=regime.batch_size, shuffle=True, seed=0), epochs=regime.epochs,
                        lr=regime.lr, seed=0, after_epoch=lambda _: after.append({k: v.detach().clone() for k, v in adapted_weights(model).items()}))
        assert checkpoints[0].keys() == own.keys() and all(torch.equal(checkpoints[0][k], after[-2][k]) for k in own)


def test_members_see_the_seeds_items_in_an_order_of_their_own(store, monkeypatch):
    s, seen = tiny(store), []
    original = comparison.training.fine_tune
    monkeypatch.setattr(comparison.training, "fine_tune", lambda model, loader, **k: (
        seen.append([int(x) for batch in loader for x in batch["input_ids"].sum(1)]), original(model, loader, **k))[1])
    run(s, "ensemble", members=3).predictor()
    expected = [int(x) for batch in s.loader(s.train_items(0)) for x in batch["input_ids"].sum(1)]
    orders = seen if len(seen) == 2 else seen + [None]  # the second member may be there already
    assert all(order is None or (sorted(order) == sorted(expected) and order != expected) for order in orders)
    assert orders[0] != orders[-1]


def test_no_fit_looks_at_a_split_that_is_evaluated_on(store):
    s = tiny(store).regime("lora")
    s.map_folder(0)  # its history, for chapter 1, does
    for split in ("test", "validation", *s.shifts):
        del s.task[split]
    for name in NAMES:
        run(s, name, **({"samples": 3} if "samples" in settings(s, name, {}) else {})).predictor()


def test_tfb_keeps_its_tolerance_on_the_fine_tuning_set_and_a_little_more_noise_would_not(store, monkeypatch):
    s, searches = tiny(store).regime("lora"), []
    original = comparison.largest_within

    def spy(change, *args, **options):
        searches.append((change, original(change, *args, **options)))
        return searches[-1][1]

    monkeypatch.setattr(comparison, "largest_within", spy)
    nll = lambda p: predictions.predict(p, s.loader(s.train_items(0)), progress=False).summary()["nll"]  # noqa: E731
    said = run(s, "tfb", tolerance=2e-4, samples=4).predictor()
    (change, sigma), = searches
    assert change(sigma) <= 2e-4 < change(sigma * 2 ** (2**-5))  # the search's own precision
    assert nll(said) / nll(s.map_model(0)) - 1 == pytest.approx(change(sigma), abs=1e-6)  # batches differ


def test_a_size_of_its_own(store):
    s = tiny(store)
    small, whole = (s.baseline_predictions(0, "last_layer_laplace", size=size) for size in (8, None))
    assert (small.probs != whole.probs).any()
    assert Run(s, 0, "ensemble", {}, 8).items[0] == s.train_items(0, 8)[0]


def test_unknown_names_options_and_regimes_are_errors(store):
    s = tiny(store)
    with pytest.raises(ValueError, match="unknown baseline 'dropout'; there are: ensemble"):
        s.baseline_predictions(0, "dropout")
    with pytest.raises(ValueError, match="'swag' sits on LoRA"):
        s.baseline_predictions(0, "swag")
    with pytest.raises(ValueError, match="ensemble has no option 'samples'; it has: members"):
        s.baseline_predictions(0, "ensemble", samples=3)
    with pytest.raises(ValueError, match="checkpoints=9 must lie between 1 and the 2 that the run kept"):
        s.baseline_predictions(0, "checkpoint_ensemble", checkpoints=9)
    assert comparison.names(s) == EITHER and comparison.names(s.regime("lora")) == NAMES
    assert set(NAMES) <= plots.METHODS.keys()
