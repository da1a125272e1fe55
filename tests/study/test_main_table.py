"""The main table's rows: which a regime has, whose answers they are, and what is confined to some experts."""
import numpy as np
import pytest
import torch

from bmoe_utils.study import main_table, plots
from bmoe_utils.study.profiles import CPU, PROFILES
from bmoe_utils.study.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    from bmoe_utils.study.output import Store
    small = {"pretrain_lines": 500, "pretrain_steps": 3, "train_size": 12, "epochs": 1, "test_size": 12, "router_items": 10, "router_validation": 10,
             "seeds": [0], "members": 2, "router_epochs": 1, "curves": False, "mc_samples": 20}
    return Study("smoke", overrides=small, store=Store(tmp_path_factory.mktemp("cache")))


def test_every_row_of_every_profile_is_known_and_has_a_style():
    for name, profile in PROFILES.items():
        assert set(profile["methods"]) <= set(main_table.KNOWN), name
    assert set(main_table.KNOWN) <= set(plots.METHODS)


def test_a_regime_has_the_posteriors_it_can_hold(study):
    full = main_table.rows_of(study)
    assert not set(full) & set(main_table.ON_LORA)
    assert set(main_table.rows_of(study.regime("lora"))) == set(CPU["methods"])


def test_an_unknown_row_is_named(study):
    with pytest.raises(ValueError, match="unknown method 'router_magic'; there are: map, temperature"):
        main_table.rows_of(Study("smoke", overrides={"methods": ["map", "router_magic"]}, store=study.store))
    with pytest.raises(ValueError, match="unknown method 'router_magic'"):
        main_table.answers(study, 0, "router_magic")


def test_all_rows_answer_the_same_questions(study):
    said = main_table.table_of(study, methods=["map", "temperature", "laplace_kron", "router_laplace", "last_layer_laplace", "joint"])
    for method, (run,) in said.items():
        assert len(run) == study.router_items and np.array_equal(run.labels, said["map"][0].labels), method
        assert np.allclose(run.probs.sum(1), 1), method
    assert np.array_equal(said["map"][0].probs.argmax(1), said["temperature"][0].probs.argmax(1))


def test_the_size_is_that_of_the_fine_tuning_set(study):
    smaller, own = main_table.answers(study, 0, "map", size=6), main_table.answers(study, 0, "map", size=12)
    assert np.array_equal(own.probs, main_table.answers(study, 0, "map").probs) and not np.array_equal(own.probs, smaller.probs)
    assert np.array_equal(smaller.probs, study.map_predictions(0, size=6).head(study.router_items).probs)


def test_the_width_is_the_best_on_validation(study):
    width = main_table.width_by_validation(study, 0)
    nll = {w: study.router_predictions(0, "mfvr", "validation", inference="whole-model", num_samples=study.validation_passes, prior_std=w,
                                       fitted=False).summary()["nll"] for w in main_table.WIDTHS}
    assert nll[width] == min(nll.values())


def test_busiest_experts():
    counts = torch.tensor([[5, 9, 1, 7], [0, 0, 3, 2]])
    assert main_table.busiest(counts, 0.5).tolist() == [[False, True, False, True], [False, False, True, True]]
    assert main_table.busiest(-counts, 0.25).tolist() == [[False, False, True, False], [True, False, False, False]]


def test_confined_to_all_is_the_posterior_and_to_none_almost_the_map(study):
    plain = study.laplace_predictions(0, items=study.router_items)
    assert np.array_equal(main_table.confined_predictions(study, 0, 1.0).probs, plain.probs)
    busy, idle = (main_table.confined_predictions(study, 0, 0.25, most_used=used).probs for used in (True, False))
    map_probs = main_table.answers(study, 0, "map").probs
    # fewer uncertain experts move the answers less; the idlest quarter least (an expert hardly any token reaches)
    moved = [np.abs(p - map_probs).mean() for p in (plain.probs, busy, idle)]
    assert moved[0] > moved[1] and moved[0] > moved[2] and not np.array_equal(busy, idle)
