"""Saved posteriors and bad input: what does not fit is named, and nothing is left half done."""

import json

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.routers.attach import Routers


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
    monkeypatch.setattr("bmoe_utils.models.files.save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        la.save(tmp_path / "posterior")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posterior"]
    monkeypatch.undo()
    bm.ExpertLaplace.load(tmp_path / "posterior", model)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_names_the_folder(error, tmp_path, monkeypatch):
    la = fitted(tiny_model(), [tiny_batch()])
    monkeypatch.setattr("bmoe_utils.models.files.save_file", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="posterior could not be written .*No space left.*intact"):
        la.save(tmp_path / "posterior")
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_not_a_posterior_is_replaced(tmp_path, monkeypatch):
    """Also before anything is computed, and before a fit that would keep its state there."""
    model, batch = tiny_model(), tiny_batch()
    la = fitted(model, [batch])
    results, saved, attached = tmp_path / "results", tmp_path / "saved", tmp_path / "routers"
    results.mkdir()
    (results / "model.safetensors").write_bytes(b"weights")
    la.save(saved)
    with bm.attach_routers(model, "mfvr") as routers:
        routers.save(attached)
        for folder in (results, saved):
            with pytest.raises(ValueError, match="no whole routers of ours"):
                routers.save(folder)
        for folder in (results, saved, attached):
            with pytest.raises(ValueError, match="no whole checkpoint of ours"):
                routers.fit([batch], checkpoint=folder, epochs=1, progress=False)
    monkeypatch.setattr("bmoe_utils.experts.fitting.read_out", lambda *a: pytest.fail("the fit began"))
    monkeypatch.setattr("bmoe_utils.models.files.model_fingerprint", lambda *a: pytest.fail("the save began"))
    for folder in (results, saved, attached):
        with pytest.raises(ValueError, match=f"{folder.name} holds .*no whole checkpoint of ours"):
            bm.ExpertLaplace(model).fit([batch], checkpoint=folder, progress=False)
    for folder in (results, attached):
        with pytest.raises(ValueError, match=f"{folder.name} holds .*no whole posterior of ours.*new or an empty folder"):
            la.save(folder)
    monkeypatch.undo()
    assert [p.name for p in results.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="saved holds a posterior, not routers"):
        Routers.load(saved, model)
    with pytest.raises(ValueError, match="routers holds routers, not a posterior"):
        bm.ExpertLaplace.load(attached, model)
    assert torch.equal(bm.ExpertLaplace.load(saved, model)(batch), la(batch))


def test_a_posterior_takes_anothers_place_and_leaves_the_rest(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    one, two = fitted(model, [batch]), fitted(model, [batch], hessian_structure="diag")
    one.save(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    two.save(tmp_path)
    again = bm.ExpertLaplace.load(tmp_path, model)
    assert torch.equal(again(batch), two(batch)) and len(list(tmp_path.iterdir())) == 3
    again.save(tmp_path)  # its tensors are mapped from the file that is there
    one.save(tmp_path)
    assert torch.equal(again(batch), two(batch)) and torch.equal(bm.ExpertLaplace.load(tmp_path, model)(batch), one(batch))
    assert (tmp_path / "README.md").read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


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
