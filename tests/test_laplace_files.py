"""Saved posteriors and bad input: what does not fit is named, and nothing is left half done."""

import json

import pytest
import torch
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.capture import expert_layers


def fitted(model, batches, **options):
    return bm.ExpertLaplace(model, **options).fit(batches, progress=False)


@pytest.mark.parametrize("options", [dict(), dict(token_setting="reduce", fisher="mc"), dict(rank=3), dict(rank=0.5),
                                     dict(hessian_structure="ekfac", rank=2), dict(hessian_structure="diag"), dict(hessian_structure="full", layers=[1])])
def test_save_and_load_give_the_same_posterior(tmp_path, options):
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch], prior_precision=0.7, **options)
    la.save(tmp_path / "posterior")
    again = bm.ExpertLaplace.load(tmp_path / "posterior", model)
    assert torch.equal(again(batch), la(batch))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert again.options == la.options and again.layers == la.layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posterior"]  # nothing left beside it
    la.save(tmp_path / "posterior")  # over an existing one


def test_loading_what_does_not_fit_is_a_clear_error(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    folder = tmp_path / "posterior"
    fitted(model, [batch]).save(folder)
    with pytest.raises(ValueError, match="other weights"):
        bm.ExpertLaplace.load(folder, tiny_model(seed=1))
    with pytest.raises(ValueError, match="hessian_structure='kron', not 'diag'"):
        bm.ExpertLaplace.load(folder, model, hessian_structure="diag")
    with pytest.raises(ValueError, match="no option"):
        bm.ExpertLaplace.load(folder, model, structure="diag")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"options": manifest["options"] | {"fisher": "mc"}}))
    with pytest.raises(ValueError, match="changed"):
        bm.ExpertLaplace.load(folder, model)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = (folder / "posterior.safetensors").read_bytes()
    (folder / "posterior.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut short"):
        bm.ExpertLaplace.load(folder, model)
    for content in ("{", "[]", ""):
        (folder / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="no readable posterior"):
            bm.ExpertLaplace.load(folder, model)
    with pytest.raises(ValueError, match="no readable posterior"):
        bm.ExpertLaplace.load(tmp_path / "nowhere", model)


def test_a_failed_save_leaves_the_previous_files(tmp_path, monkeypatch):
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch])
    la.save(tmp_path / "posterior")
    monkeypatch.setattr("bmoe_utils.files.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        la.save(tmp_path / "posterior")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posterior"]
    monkeypatch.undo()
    bm.ExpertLaplace.load(tmp_path / "posterior", model)


def test_bad_options_are_named():
    model = tiny_model()
    for options, message in [
        (dict(hessian_structure="kfac"), "'kron', 'ekfac', 'diag', 'full'"),
        (dict(fisher="true"), "'exact', 'mc', 'empirical'"),
        (dict(token_setting="sum"), "'expand', 'reduce', 'active'"),
        (dict(hessian_structure="diag", token_setting="reduce"), "belong to 'kron'"),
        (dict(layers=[2]), "no MoE layer 2"),
        (dict(layers=[]), "no MoE layer chosen"),
        (dict(layers=[0, -2]), "named twice"),
        (dict(rank=7), "rank=7"),
        (dict(prior_precision=0.0), "positive"),
        (dict(prior_precision=torch.ones(3)), "one per layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            bm.ExpertLaplace(model, **options)
    with pytest.raises(ValueError, match="num_samples=0"):
        bm.ExpertLaplace(model)(tiny_batch(), num_samples=0)
    with pytest.raises(RuntimeError, match="fit"):
        bm.ExpertLaplace(model)(tiny_batch())
    with pytest.raises(ValueError, match="no batch"):
        bm.ExpertLaplace(model).fit([], progress=False)
    from transformers import AutoModelForCausalLM, LlamaConfig
    dense = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8,
                                                         num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="no fused mixture-of-experts"):
        bm.ExpertLaplace(dense)


def test_non_finite_numbers_name_layer_and_batch():
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        expert_layers(model)["model.layers.1.mlp.experts"].gate_up_proj[:] = torch.inf
    with pytest.raises(ValueError, match="batch 0"):
        bm.ExpertLaplace(model).fit([batch], progress=False)


def test_unlabelled_items_fit_but_have_no_evidence():
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch | {"labels": torch.full((5,), -1)}])
    la.optimize_prior_precision()
    with pytest.raises(ValueError, match="labels"):
        la.log_marginal_likelihood()
