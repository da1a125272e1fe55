"""Prediction over ragged batches, its guards, the saved file, and the tables over seeds."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import single_items, tiny_batch, tiny_model

from bmoe_utils.models import readout
from bmoe_utils.scores import metrics, predictions, tables

INF = float("inf")


class Toy(torch.nn.Module):
    """A model whose option logits are its batch's `logits`; its dropout sits in eval mode while the rest trains."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(1, 1, bias=False)
        self.dropout = torch.nn.Dropout(0.5)
        torch.nn.init.ones_(self.head.weight)
        self.train()
        self.dropout.eval()
        self.seen = []

    def forward(self, logits):
        self.seen.append((self.training, self.head.training, self.dropout.training, torch.is_grad_enabled()))
        return self.dropout(self.head(logits.unsqueeze(-1)).squeeze(-1))


@pytest.fixture(autouse=True)
def toy_read_out(monkeypatch):
    real = readout.option_logits

    def option_logits(model, batch):
        if not isinstance(model, Toy):
            return real(model, batch)
        return torch.where(batch["option_ids"] < 0, -torch.inf, model(batch["logits"].clamp(min=-1e3)))

    monkeypatch.setattr(readout, "option_logits", option_logits)


def batch(logits, labels, p_star=None):
    logits = torch.tensor(logits)
    out = {"logits": logits, "option_ids": torch.where(logits.isinf(), -1, 5), "labels": torch.tensor(labels)}
    return out if p_star is None else out | {"p_star": torch.tensor(p_star)}


def ragged():
    """Two batches of widths 2 and 4; the second holds an item with three options and an unknown label."""
    wide = batch([[0.0, 1.0, 2.0, -INF], [3.0, 1.0, 0.0, 1.0]], [2, -1], [[0.2, 0.3, 0.5, 0.0], [0.25] * 4])
    return [batch([[1.0, 0.0]], [0], [[0.6, 0.4]]), wide]


EXPECTED = np.zeros((3, 4))
EXPECTED[0, :2] = np.exp([1, 0]) / np.exp([1, 0]).sum()
EXPECTED[1, :3] = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
EXPECTED[2] = np.exp([3, 1, 0, 1]) / np.exp([3, 1, 0, 1]).sum()


def from_logits(item):
    return metrics.softmax(item["logits"])


def quiet(predictor, loader):
    return predictions.predict(predictor, loader, progress=False)


def test_ragged_batches_are_padded_in_order():
    said = quiet(Toy(), ragged())
    np.testing.assert_allclose(said.probs, EXPECTED, atol=1e-7)
    assert (said.probs[EXPECTED == 0] == 0).all()
    np.testing.assert_array_equal(said.logits, [[1, 0, -INF, -INF], [0, 1, 2, -INF], [3, 1, 0, 1]])
    np.testing.assert_allclose(said.p_star[0], [0.6, 0.4, 0, 0], atol=1e-7)
    assert said.labels.tolist() == [0, 2, -1]
    assert said.probs.dtype == said.logits.dtype == said.p_star.dtype == np.float64 and said.labels.dtype == np.int64


def test_a_mixture_of_experts_item_by_item_and_in_a_batch():
    model, items = tiny_model(), tiny_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, single = quiet(model, [items]), quiet(model, single_items(items))
    np.testing.assert_allclose(single.probs, whole.probs, atol=1e-10)
    assert np.ptp(whole.probs[:, 0]) > 1e-3  # the items do differ
    np.testing.assert_array_equal(whole.probs == 0, items["option_ids"].numpy() < 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_signals_rise_with_uncertainty():
    said = quiet(Toy(), [batch([[9.0, 0.0], [0.1, 0.0]], [0, 0])])
    assert set(said.signals) == {"answer_entropy", "max_prob"}
    for signal in said.signals.values():
        assert signal[0] < 0.01 < 0.4 < signal[1]
    assert said.signals["max_prob"] == pytest.approx(1 - said.probs.max(1))


def test_a_callable_equals_the_model_and_may_bring_signals():
    model, function = quiet(Toy(), ragged()), quiet(from_logits, ragged())
    np.testing.assert_allclose(function.probs, model.probs, atol=1e-7)
    assert function.logits is None
    signalled = quiet(lambda b: (from_logits(b), {"width": torch.full((len(b["labels"]),), b["logits"].shape[1])}), ragged())
    assert signalled.signals["width"].tolist() == [2, 4, 4] and "answer_entropy" in signalled.signals


def test_eval_mode_without_gradients_and_every_mode_restored():
    model = Toy()
    quiet(model, ragged())
    assert model.seen == [(False, False, False, False)] * 2
    assert (model.training, model.head.training, model.dropout.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_a_failure_in_the_middle():
    model = Toy()
    with pytest.raises(KeyError):
        quiet(model, [*ragged(), {"logits": torch.zeros(1, 2)}])
    assert len(model.seen) == 2
    assert (model.training, model.head.training, model.dropout.training) == (True, True, False)
    assert torch.is_grad_enabled()


def test_p_star_only_where_every_batch_has_it():
    assert quiet(Toy(), [*ragged(), batch([[0.0, 0.0]], [0])]).p_star is None


@pytest.mark.parametrize(
    "predictor, loader, message",
    [
        (from_logits, [], "empty"),
        (lambda b: from_logits(b)[:, :1], ragged(), "shaped like option_ids"),
        (lambda b: torch.full(b["logits"].shape, 1 / b["logits"].shape[1]), ragged(), "missing option"),
        (from_logits, [batch([[0.0, -INF]], [1])], "label points"),
        (from_logits, [batch([[0.0, 0.0]], [2])], "label points"),
        (from_logits, [batch([[0.0, 0.0]], [-100])], "label points"),
        (lambda b: (from_logits(b), {"s": torch.zeros(5)}), ragged(), "s must be"),
        (lambda b: from_logits(b) * torch.nan, ragged()[:1], "finite"),
    ],
)
def test_bad_predictors_and_batches(predictor, loader, message):
    with pytest.raises(ValueError, match=message):
        quiet(predictor, loader)


def test_neither_module_nor_callable():
    with pytest.raises(TypeError, match="str"):
        quiet("model", ragged())


def test_progress_names_its_work(capsys):
    predictions.predict(from_logits, ragged())
    assert "predict" in capsys.readouterr().err
    quiet(from_logits, ragged())
    assert capsys.readouterr().err == ""


def test_summary_and_unknown_labels():
    said = quiet(Toy(), ragged())
    with pytest.raises(ValueError, match="unknown label"):
        said.summary()
    known = quiet(Toy(), ragged()[:1])
    assert known.summary() == metrics.summary(known.probs, known.labels, known.p_star)
    assert known.oracle().summary()["kl"] == 0 and known.summary()["kl"] > 0
    with pytest.raises(ValueError, match="no oracle"):
        predictions.Predictions(known.probs, known.labels).oracle()


def test_save_and_load(tmp_path):
    said = quiet(lambda b: (from_logits(b), {"gate_entropy": b["labels"] / 3}), ragged())
    path = tmp_path / "deeper" / "said.safetensors"
    said.save(path)
    back = predictions.Predictions.load(path)
    for name in ("probs", "labels", "p_star"):
        np.testing.assert_array_equal(getattr(back, name), getattr(said, name))
    assert back.logits is None and list(back.signals) == sorted(said.signals)
    for name, signal in said.signals.items():
        np.testing.assert_array_equal(back.signals[name], signal)
    quiet(Toy(), ragged()).save(path)  # over the old file; -inf survives
    assert np.isneginf(predictions.Predictions.load(path).logits[0, 2])
    assert [p.name for p in path.parent.iterdir()] == ["said.safetensors"]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "said.safetensors"
    quiet(from_logits, ragged()).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="said.safetensors is not a complete"):
        predictions.Predictions.load(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no predictions"):
        predictions.Predictions.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "said.safetensors"
    said = quiet(from_logits, ragged())
    said.save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        said.save(path)
    assert len(predictions.Predictions.load(path)) == 3 and len(list(tmp_path.iterdir())) == 1


def test_predictions_convert_and_check():
    said = predictions.Predictions([[0.5, 0.5]], torch.tensor([1]), {"s": [1]})
    assert said.probs.dtype == np.float64 and said.signals["s"].tolist() == [1.0]
    with pytest.raises(ValueError, match="labels must be"):
        predictions.Predictions([[0.5, 0.5]], [1, 0])
    with pytest.raises(ValueError, match="p_star must be shaped"):
        predictions.Predictions([[0.5, 0.5]], [1], p_star=np.ones((1, 3)))
    with pytest.raises(ValueError, match="nothing"):
        predictions.Predictions.concat([])


# ---------------------------------------------------------------------------------------------------------------- tables

SUMMARY = {"accuracy": 0.47, "nll": 1.2, "ece": 0.04, "mce": 0.1, "brier": 0.6}


def test_table_means_deviations_and_order():
    rows = {
        "map": [SUMMARY | {"nll": v, "kl": 0.3} for v in (1.0, 1.2, 1.7)],
        "base": [SUMMARY],
    }
    table = tables.comparison_table(rows)
    assert list(table.index) == ["map", "base"]
    names = [name for name, statistic in table.columns if statistic == "mean"]
    assert names == ["ACC", "NLL", "ECE", "MCE", "Brier", "KL"]
    assert table.loc["map", ("NLL", "mean")] == pytest.approx(1.3)
    assert table.loc["map", ("NLL", "std")] == pytest.approx(np.std([1.0, 1.2, 1.7], ddof=1))
    assert np.isnan(table.loc["base", ("NLL", "std")]) and np.isnan(table.loc["base", ("KL", "mean")])
    assert "KL" not in tables.comparison_table({"base": [SUMMARY]}).columns.get_level_values(0)


def test_table_takes_predictions_and_an_oracle_row():
    seeds = [quiet(Toy(), ragged()[:1])] * 2
    table = tables.comparison_table({"oracle": tables.oracle_row(seeds), "map": seeds})
    assert table.loc["oracle", ("KL", "mean")] == 0 < table.loc["map", ("KL", "mean")]
    assert table.loc["map", ("NLL", "mean")] == pytest.approx(seeds[0].summary()["nll"])
    assert table.loc["oracle", ("NLL", "mean")] == pytest.approx(-np.log(0.6), abs=1e-6)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({}, "no rows"),
        ({"map": []}, "non-empty list"),
        ({"map": SUMMARY}, "non-empty list"),
        ({"map": [SUMMARY, SUMMARY | {"kl": 0.1}]}, "differ in their metrics"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        tables.comparison_table(rows)


def test_formatting_and_markdown():
    rows = {"map": [SUMMARY | {"nll": v, "kl": 0.3} for v in (0.1, 3.1)], "base": [SUMMARY]}
    text = tables.format_table(tables.comparison_table(rows), labels={"map": "MAP"})
    assert list(text.columns) == ["ACC ↑", "NLL ↓", "ECE ↓", "MCE ↓", "Brier ↓", "KL ↓"]
    assert text.loc["MAP", "ACC ↑"] == "0.470 ± .000" and text.loc["MAP", "NLL ↓"] == "1.600 ± 2.121"
    assert text.loc["base", "NLL ↓"] == "1.200" and text.loc["base", "KL ↓"] == "–"
    lines = tables.to_markdown(text).splitlines()
    assert lines[0] == "| method | ACC ↑ | NLL ↓ | ECE ↓ | MCE ↓ | Brier ↓ | KL ↓ |"
    assert lines[1] == "| :-- | --: | --: | --: | --: | --: | --: |"
    assert lines[3].startswith("| base | 0.470 | 1.200 |") and len(lines) == 4
    assert isinstance(text, pd.DataFrame)


def test_predict_keeps_the_signals_of_what_has_them():
    class Source:
        def __call__(self, batch):
            return np.full(batch["option_ids"].shape, 0.5)

        def signals(self):
            return {"gate_entropy_last": np.array([0.25, 0.75])}

    batches = [{"option_ids": np.zeros((2, 2), int), "labels": np.array([0, 1])}] * 2
    said = predictions.predict(Source(), batches, progress=False)
    assert said.signals["gate_entropy_last"].tolist() == [0.25, 0.75] * 2 and "answer_entropy" in said.signals


def test_head_cuts_everything_alike():
    said = predictions.Predictions(np.full((3, 2), 0.5), [0, 1, 0], {"s": [1.0, 2.0, 3.0]}, np.zeros((3, 2)), np.full((3, 2), 0.5))
    first = said.head(2)
    assert len(first) == 2 and first.signals["s"].tolist() == [1.0, 2.0] and first.logits.shape == first.p_star.shape == (2, 2)
    assert said.head(None).labels.tolist() == [0, 1, 0]
