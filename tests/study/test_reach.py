"""The dual form against the dense one, in float64: every covariance, evidence and mode from P x P matrices over all weights."""

from functools import partial

import pytest
import torch
from tiny import ARCHITECTURES, single_items, tiny_batch, tiny_model
from torch.func import functional_call

from bmoe_utils.experts.exact import joint_predictive
from bmoe_utils.experts.laplace import ExpertLaplace
from bmoe_utils.models.layers import down_weight, expert_layers
from bmoe_utils.models.readout import option_logits
from bmoe_utils.study import blocks, reach

# transformers' RMSNorm computes in float32 within float64 models: two ways round the same graph agree to its rounding
close = partial(torch.testing.assert_close, rtol=5e-6, atol=1e-6)
SMALL = dict(hidden_size=8, num_hidden_layers=1, moe_intermediate_size=3, shared_expert_intermediate_size=4, num_experts=3, vocab_size=20)


def small_batch(items, seed):
    batch = tiny_batch(items, length=5, seed=seed)
    batch["input_ids"] = batch["input_ids"] % 20
    batch["option_ids"] = torch.where(batch["option_ids"] < 0, -1, batch["option_ids"] % 20)
    return batch


@pytest.fixture(scope="module")
def case():
    """A tiny model with its fitting set, the items looked at, and everything dense: J [N, C, P], W - W_0 [P] and each weight's block."""
    model = tiny_model(seed=1, scale=0.4, **SMALL)
    fit, look = small_batch(9, 2), small_batch(4, 3)
    names = blocks.weight_blocks(model)
    parameters = dict(model.named_parameters())
    every = [n for of in names.values() for n in of]

    def jacobians(batch):
        rows, logits = [], []
        for item in single_items(batch):
            def f(*values):
                out = functional_call(model, dict(zip(every, values)), kwargs={"input_ids": item["input_ids"], "use_cache": False}).logits[0, -1]
                ids = item["option_ids"][0]
                return out[ids.clamp(min=0)].masked_fill(ids < 0, 0.0)
            parts = torch.autograd.functional.jacobian(f, tuple(parameters[n].detach() for n in every))
            rows.append(torch.cat([p.flatten(1) for p in parts], 1))
            logits.append(option_logits(model, item)[0].detach())
        return torch.stack(rows), torch.stack(logits)

    block = torch.cat([torch.full((parameters[n].numel(),), i) for i, of in enumerate(names.values()) for n in of])
    centred = torch.cat([(parameters[n].detach() - (1.0 if "norm" in n else 0.0)).flatten() for n in every])
    kernels = blocks.block_kernels(model, [fit], [look], progress=False)
    return {"model": model, "fit": fit, "look": look, "names": list(names), "block": block, "W": centred, "kernels": kernels,
            "J": jacobians(fit), "J_look": jacobians(look)}


def precisions(case, names=None):
    return {b: 0.3 + 0.7 * i for i, b in enumerate(case["names"]) if names is None or b in names}


def centring(logits):
    """The projection [.., C, C] that takes the mean over an item's options away."""
    m = logits.isfinite().double()
    return torch.diag_embed(m) - m[:, :, None] * m[:, None, :] / m.sum(1)[:, None, None]


def dense_posterior(case, precision, Lambda):
    """(H + Lambda_prior)^-1 over the chosen weights [p, p], and their index."""
    index = torch.cat([(case["block"] == case["names"].index(b)).nonzero().squeeze(1) for b in precision])
    lam = torch.tensor([precision[case["names"][i]] for i in case["block"][index]], dtype=torch.float64)
    J = case["J"][0][:, :, index]
    H = torch.einsum("ncp,ncd,ndq->pq", J, Lambda, J)
    return torch.linalg.inv(H + torch.diag(lam)), index, H, lam


def exact_lambda(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


# ---- contrasts and roots --------------------------------------------------------------------------------------------
def test_contrasts_are_orthonormal_and_blind_to_a_shift():
    present = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 0]]).bool()
    D = reach.contrasts(present)
    torch.testing.assert_close(D.mT @ D, centring(torch.where(present, 0.0, -torch.inf)).double())
    for row, m in zip(D, present.sum(1)):
        torch.testing.assert_close(row @ row.mT, torch.diag((torch.arange(3) < m - 1).double()))
        assert (row.sum(1).abs() < 1e-15).all()


@pytest.mark.parametrize("kind", ["exact", "smoothed", "empirical"])
def test_roots_are_those_of_the_curvature(kind):
    logits = torch.randn(3, 4, dtype=torch.float64) * 3
    logits[1, 2] = -torch.inf
    D, labels, p = reach.contrasts(logits.isfinite()), torch.tensor([0, 1, 3]), logits.softmax(-1)
    if kind == "smoothed":
        p = 0.8 * p + 0.2 * torch.tensor([[0.25] * 4, [1 / 3, 1 / 3, 0, 1 / 3], [0.25] * 4])
        root = reach.likelihood_root(logits, D, smoothing=0.2)
    else:
        root = reach.likelihood_root(logits, D, kind, labels=labels)
    residual = torch.nn.functional.one_hot(labels, 4) - p
    Lambda = residual[:, :, None] * residual[:, None, :] if kind == "empirical" else torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(D.mT @ (root @ root.mT) @ D, Lambda)


def test_unknown_choices_are_named(case):
    with pytest.raises(ValueError, match="'exact' or 'empirical'"):
        case["kernels"].root("mc")
    with pytest.raises(ValueError, match="no block tail; there are: experts: down"):
        case["kernels"].summed({"tail": 1.0})
    with pytest.raises(ValueError, match="positive"):
        case["kernels"].summed({"head": 0.0})


# ---- blocks and kernels ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_one_block(architecture):
    model = tiny_model(architecture)
    found = blocks.weight_blocks(model)
    names = [n for of in found.values() for n in of]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters()) and list(found) == [b for b in blocks.BLOCKS if b in found]
    parameters = dict(model.named_parameters())
    own = {p.data_ptr() for m in expert_layers(model).values() for p in [down_weight(m)]}
    assert {parameters[n].data_ptr() for n in found["experts: down"] if "bias" not in n} == own
    assert all("router" in n or "gate.weight" in n for n in found["routers"]) and "lm_head.weight" in found["head"]


def test_a_tied_head_is_part_of_the_embeddings_until_it_is_untied():
    model = tiny_model(tie_word_embeddings=True)
    model.tie_weights()
    batch = tiny_batch()
    before = option_logits(model, batch)
    assert "head" not in blocks.weight_blocks(model)
    tied = blocks.block_kernels(model, [batch], [batch], progress=False)
    blocks.untied(model)
    assert torch.equal(option_logits(model, batch), before) and "head" in blocks.weight_blocks(model)
    apart = blocks.block_kernels(model, [batch], [batch], progress=False)
    assert apart.distance["head"] == apart.distance["embeddings"] == tied.distance["embeddings"]
    slope = apart.fit_slope["head"] + apart.fit_slope["embeddings"]  # J W is linear in what is tied, J J^T is not
    close(tied.fit_slope["embeddings"], slope)


def test_the_model_is_left_as_it_was():
    model, batch = tiny_model(**SMALL), small_batch(3, 0)
    model.train()
    next(model.parameters()).requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    blocks.block_kernels(model, [batch], [batch], progress=False)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and model.training
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


def test_kernels_are_inner_products_of_the_dense_jacobians(case):
    k = case["kernels"]
    J, look = (torch.einsum("nkc,ncp->nkp", D, J) for D, J in ((k.fit_contrasts, case["J"][0]), (k.contrasts, case["J_look"][0])))
    for i, b in enumerate(case["names"]):
        mine, theirs = J[:, :, case["block"] == i].flatten(0, 1), look[:, :, case["block"] == i]
        W = case["W"][case["block"] == i]
        close(k.fit[b], mine @ mine.mT)
        close(k.cross[b], theirs.flatten(0, 1) @ mine.mT)
        close(k.own[b], theirs @ theirs.mT)
        close(k.fit_slope[b], mine @ W)
        close(k.own_slope[b], (theirs @ W).flatten())
        assert k.distance[b] == pytest.approx(float(W @ W)) and k.size[b] == len(W)


def test_batches_and_padding_change_nothing(case):
    singles = [blocks.block_kernels(case["model"], list(single_items(case["fit"])), list(single_items(case["look"])), progress=False)]
    for b in case["names"]:
        close(singles[0].cross[b], case["kernels"].cross[b])


# ---- posterior and evidence -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("chosen", [None, ("experts: down",), ("head", "routers")])
def test_covariance_and_its_parts_are_the_dense_ones(case, chosen):
    precision, k = precisions(case, chosen), case["kernels"]
    Sigma, index, _, _ = dense_posterior(case, precision, exact_lambda(case["J"][1]))
    J = centring(case["J_look"][1]) @ case["J_look"][0][:, :, index]
    cov, parts = reach.covariance(k, precision, k.root())
    close(cov, J @ Sigma @ J.mT)
    for b in precision:
        of = case["block"][index] == case["names"].index(b)
        close(parts[b], torch.einsum("ncp,pq,ncq->n", J[:, :, of], Sigma[of], J))
    close(sum(parts.values()), cov.diagonal(dim1=1, dim2=2).sum(1))


def test_without_data_the_prior_is_left(case):
    precision = precisions(case)
    cov, parts = reach.covariance(case["kernels"], precision, None)
    lam = torch.tensor([precision[case["names"][i]] for i in case["block"]], dtype=torch.float64)
    J = centring(case["J_look"][1]) @ case["J_look"][0]
    close(cov, (J / lam) @ J.mT)
    close(sum(parts.values()), cov.diagonal(dim1=1, dim2=2).sum(1))


def test_the_experts_block_is_the_joint_reference(case):
    cov, _ = reach.covariance(case["kernels"], {"experts: down": 0.7}, case["kernels"].root())
    (_, exact), = joint_predictive(ExpertLaplace(case["model"], prior_precision=0.7), [case["fit"]], [case["look"]], progress=False)
    centre = centring(case["J_look"][1])
    close(cov, centre @ exact @ centre)


def test_evidence_is_the_dense_determinant_and_its_optimum_is_one(case):
    names, k = ["experts: down", "routers"], case["kernels"]
    h = reach.spectrum(k, names, k.root())
    distance = sum(k.distance[b] for b in names)
    lam = torch.tensor([0.2, 3.0], dtype=torch.float64)
    _, _, H, _ = dense_posterior(case, dict.fromkeys(names, 1.0), exact_lambda(case["J"][1]))
    eye = torch.eye(len(H), dtype=torch.float64)
    dense = torch.stack([-5.0 - 0.5 * (x * distance + torch.linalg.slogdet(eye + H / x)[1]) for x in lam])
    close(reach.log_evidence(-5.0, h, distance, lam), dense)
    best = torch.tensor([reach.best_precision(h, distance)], dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(reach.log_evidence(0.0, h, distance, best).sum(), best)
    assert abs(float((slope * best).detach())) < 1e-5


def test_the_gap_to_a_mode_is_the_gradient(case):
    precision, k = precisions(case, ("attention", "head")), case["kernels"]
    _, index, _, lam = dense_posterior(case, precision, exact_lambda(case["J"][1]))
    J, f = case["J"]
    gradient = torch.einsum("ncp,nc->p", J[:, :, index], torch.nn.functional.one_hot(case["fit"]["labels"], 4) - f.softmax(-1))
    pull = lam * case["W"][index]
    expected = {"likelihood": gradient.norm(), "prior": pull.norm(), "sum": (gradient - pull).norm()}
    assert reach.mode_gap(k, precision) == pytest.approx({key: float(v) for key, v in expected.items()}, rel=1e-6)


@pytest.mark.parametrize("chosen", [None, ("experts: down",)])
def test_the_linear_mode_is_the_optimum_in_weight_space(case, chosen):
    """Against L-BFGS over the weights of the linearised model themselves."""
    precision = precisions(case, chosen)
    _, index, _, lam = dense_posterior(case, precision, exact_lambda(case["J"][1]))
    (J, f), (J_look, f_look), W = case["J"], case["J_look"], case["W"][index]
    J, J_look, labels = J[:, :, index], J_look[:, :, index], case["fit"]["labels"]
    w = W.clone().requires_grad_()

    def objective():
        return -(f + J @ (w - W)).log_softmax(-1).gather(1, labels[:, None]).sum() + 0.5 * (lam * w * w).sum()

    optimiser = torch.optim.LBFGS([w], max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe")
    optimiser.step(lambda: (optimiser.zero_grad(), loss := objective(), loss.backward())[1])
    mode = reach.linear_mode(case["kernels"], precision)
    w = w.detach()
    close(mode.fit_logits.softmax(-1), (f + J @ (w - W)).softmax(-1), rtol=0, atol=1e-6)
    close(mode.logits.softmax(-1), (f_look + J_look @ (w - W)).softmax(-1), rtol=0, atol=1e-6)
    assert mode.log_likelihood == pytest.approx(float((f + J @ (w - W)).log_softmax(-1).gather(1, labels[:, None]).sum()), abs=1e-6)
    for b, d in mode.distance.items():
        of = case["block"][index] == case["names"].index(b)
        assert d == pytest.approx(float(w[of].square().sum()), rel=1e-5)


def test_labels_are_asked_for(case):
    k = case["kernels"]
    bare = reach.Kernels(**{n: getattr(k, n) for n in ("fit", "cross", "own", "fit_slope", "own_slope", "distance", "size", "fit_logits", "logits")},
                         fit_labels=torch.full_like(k.fit_labels, -1))
    for ask in (lambda: bare.root("empirical"), lambda: reach.linear_mode(bare, {"head": 1.0}), lambda: reach.mode_gap(bare, {"head": 1.0})):
        with pytest.raises(ValueError, match="needs a label"):
            ask()


# ---- leads ----------------------------------------------------------------------------------------------------------
def test_leads_and_their_deviation():
    logits = torch.tensor([[1.0, 4.0, 2.5], [0.0, -torch.inf, -1.0]])
    root = torch.randn(2, 3, 3, dtype=torch.float64)
    cov = root @ root.mT
    lead, deviation = reach.leads(logits, cov)
    torch.testing.assert_close(lead, torch.tensor([1.5, 1.0]).double())
    u = torch.tensor([[0.0, 1, -1], [1, 0, -1]]).double()
    torch.testing.assert_close(deviation, torch.einsum("nc,ncd,nd->n", u, cov, u).sqrt())
    assert reach.leads(logits)[1] is None
