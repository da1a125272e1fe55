"""One-pass low rank against what the whole spectrum would give and against an incremental SVD, in float64 unless said otherwise."""

import pytest
import torch
from routed import slots, summed
from tiny import tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bmoe_utils as bm
from bmoe_utils.experts import sketch
from bmoe_utils.experts.capture import capturing
from bmoe_utils.experts.jacobians import Routes
from bmoe_utils.experts.sketch import Sketch, sketch_size

WIDTH, ROWS = 128, 60


def stream(decay, kind, batches=60, seed=0):
    """Batches of samples whose covariance has eigenvalues ``i^-decay``. ``steady``; ``drifting``: every direction comes and goes by a
    factor of up to 80 in energy; ``late``: every direction is there for a quarter of the stream and absent otherwise."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.float64)).Q
    scale, place = torch.arange(1, WIDTH + 1, dtype=torch.float64) ** (-decay / 2), torch.arange(WIDTH) * 7
    for i in range(batches):
        now = {"steady": torch.ones(WIDTH), "drifting": 0.2 + 1.6 * ((place + 3 * i) % WIDTH) / WIDTH,
               "late": ((place - i) % batches < batches / 4).double()}[kind]
        yield (torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64) * scale * now) @ basis.T


def sketched(batches, rank, seed=0, dtype=torch.float64, experts=1):
    s = Sketch(experts, WIDTH, rank, seed, torch.zeros(0, dtype=dtype))
    for x in batches:
        s.add(x.to(dtype), Routes(torch.zeros(len(x), dtype=torch.long), torch.tensor([len(x)] + [0] * (experts - 1)), 1))
        s.close()
    return s


def incremental_svd(batches, rank):
    """``B [m, r]``, ``B B^T ~ sum x x^T``: what is kept and every batch, cut to rank r by an SVD."""
    B = torch.zeros(WIDTH, 0, dtype=torch.float64)
    for x in batches:
        U, values, _ = torch.linalg.svd(torch.cat([B, x.T], 1), full_matrices=False)
        B = (U * values)[:, :rank]
    return B


def dense(values, vectors):
    return (vectors * values[..., None, :]) @ vectors.mT


def missed(M, approximation, rank):
    """The trace that an approximation misses, in units of what the best of this rank misses."""
    best = torch.linalg.eigvalsh(M)[:-rank].sum()
    return float((M.trace() - approximation.trace()) / best)


@pytest.mark.parametrize("kind", ["steady", "drifting", "late"])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_as_good_as_an_incremental_svd_of_the_same_rank(decay, kind):
    """In the trace that is missed. Measured over three seeds: 0.97 to 1.03 times the incremental SVD's on steady and drifting streams,
    up to 1.5 times where a direction is absent from three quarters of the stream, between one restart and the next (there the
    incremental SVD itself misses 1.2 times what the best rank does). Without restarts it is 1.1 to 1.8 times everywhere."""
    rank = 16
    batches = list(stream(decay, kind))
    M = sum(x.T @ x for x in batches)
    s = sketched(batches, rank)
    assert s.progress[2] >= 3  # restarts
    values, vectors, captured = s.eigen()
    B = incremental_svd(batches, rank)
    assert missed(M, dense(values, vectors)[0], rank) < (1.6 if kind == "late" else 1.05) * missed(M, B @ B.T, rank)
    torch.testing.assert_close(captured[0], values.sum() / M.trace())


def test_without_restarts_it_keeps_the_bound_of_the_theory(monkeypatch):
    """``E missed <= (1 + r / (k - r - 1)) best`` (Tropp et al. 2017, Theorem 4.1), the mean over 40 seeds."""
    monkeypatch.setattr(sketch, "FIRST_RESTART", 1e9)
    rank = 16
    columns, _ = sketch_size(rank, WIDTH)
    for decay in (0.5, 2.0):
        batches = list(stream(decay, "steady", batches=4))
        M = sum(x.T @ x for x in batches)
        over = [missed(M, dense(*sketched(batches, rank, seed=100 * seed).eigen()[:2])[0], columns) for seed in range(40)]
        # the theorem is about all k columns against the best rank r < k - 1
        best = torch.linalg.eigvalsh(M)
        ratio = sum(over) / len(over) * float(best[:-columns].sum() / best[:-rank].sum())
        assert ratio <= 1 + rank / (columns - rank - 1)


@pytest.mark.parametrize("kind", ["steady", "late"])
@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_curvature_is_never_invented(kind, dtype, rounding):
    """``0 <= M^ <= M``, through every restart, and its vectors are orthonormal."""
    batches = list(stream(1.0, kind))
    M = sum(x.T @ x for x in batches)
    values, vectors, _ = sketched(batches, 16, dtype=dtype).eigen()
    assert values.dtype == dtype and (values >= 0).all() and (values.diff() >= 0).all()
    gap = torch.linalg.eigvalsh(M - dense(values.double(), vectors.double())[0])
    assert gap[0] > -rounding * gap[-1]
    assert (vectors.mT @ vectors - torch.eye(16, dtype=dtype)).abs().max() < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rank_of_data", [1, 5, 16])
def test_exact_where_the_data_have_that_rank(rank_of_data):
    g = torch.Generator().manual_seed(0)
    span = torch.randn(rank_of_data, WIDTH, generator=g, dtype=torch.float64)
    batches = [torch.randn(ROWS, rank_of_data, generator=g, dtype=torch.float64) @ span for _ in range(20)]
    M = sum(x.T @ x for x in batches)
    s = sketched(batches, 16)
    assert s.progress[2] > 0
    values, vectors, captured = s.eigen()
    torch.testing.assert_close(dense(values, vectors)[0], M, rtol=1e-9, atol=1e-9 * float(M.abs().max()))
    assert abs(float(captured) - 1) < 1e-9


def test_a_sketch_as_wide_as_the_factor_is_the_factor():
    batches = list(stream(1.0, "steady", batches=3))
    M = sum(x.T @ x for x in batches)
    values, vectors, captured = sketched(batches, WIDTH).eigen()
    torch.testing.assert_close(dense(values, vectors)[0], M)
    best_values, _ = torch.linalg.eigh(M)
    values, _, captured = sketched(batches, WIDTH - 4).eigen()  # its spare columns fill the width: the best truncation itself
    torch.testing.assert_close(values[0], best_values[4:])
    torch.testing.assert_close(captured[0], best_values[4:].sum() / M.trace())


def test_the_seed_decides():
    batches = list(stream(0.5, "steady", batches=10))
    one, same, other = (sketched(batches, 8, seed=s).eigen()[0] for s in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_sketches_of_parts_merge():
    """Exactly a sum before any restart; afterwards nearly what one pass would give, and still no more than the factor."""
    short = [x[:20] for x in stream(1.0, "steady", batches=2)]
    whole, first, second = sketched(short, 16), sketched(short[:1], 16), sketched(short[1:], 16)
    assert whole.progress[2] == 0
    first.merge(second)
    torch.testing.assert_close(dense(*first.eigen()[:2]), dense(*whole.eigen()[:2]), rtol=1e-9, atol=1e-9)

    batches = list(stream(1.0, "steady"))
    M = sum(x.T @ x for x in batches)
    first, second, whole = sketched(batches[:30], 16), sketched(batches[30:], 16, seed=7), sketched(batches, 16)
    first.merge(second)
    merged = dense(*first.eigen()[:2])[0]
    torch.testing.assert_close(first.energy, M.trace()[None])
    assert torch.linalg.eigvalsh(M - merged)[0] > -1e-9
    assert missed(M, merged, 16) < 1.05 * missed(M, dense(*whole.eigen()[:2])[0], 16)


@pytest.mark.parametrize("kind", ["steady", "drifting", "late"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_sketches_of_shards_miss_little_more_than_one_pass(kind, parts):
    """In the trace that is missed, measured over three decays: at most 1.09 times one pass's on steady and drifting streams, also with 8
    shards of 450 samples, each of which restarted twice; four times as many samples halve the excess. Up to 2 times where a shard of 450
    samples sees its directions come and go, against 1.4 times the best rank's in one pass. Merging one after another adds nothing: all at
    once gives the same to 0.005."""
    for decay in (0.5, 1.0, 2.0):
        batches = list(stream(decay, kind))
        M = sum(x.T @ x for x in batches)
        merged, *others = (sketched(batches[i::parts], 16) for i in range(parts))
        assert all(s.progress[2] >= 2 and s.summands() is None for s in others)
        for other in others:
            merged.merge(other)
        M_merged, M_one = (dense(*s.eigen()[:2])[0] for s in (merged, sketched(batches, 16)))
        assert torch.linalg.eigvalsh(M - M_merged)[0] > -1e-9
        assert missed(M, M_merged, 16) < (2.1 if kind == "late" else 1.1) * missed(M, M_one, 16)


def test_experts_have_their_own_sketch_and_one_without_samples_has_none():
    batches = list(stream(1.0, "steady", batches=20))
    values, vectors, captured = sketched(batches, 8, experts=2).eigen()
    assert (values[1] == 0).all() and (vectors[1] == 0).all() and captured[1].isnan()
    M = sum(x.T @ x for x in batches)
    assert missed(M, dense(values, vectors)[0], 8) < 1.1  # the first is none the worse
    factors = summed([slots(seed=1, d=3, f=4)], rank=2)
    assert factors.finish().captured[2].isnan().all() and not factors.finish().captured[0].isnan().any()


def test_an_energy_share_takes_as_many_eigenvectors_as_it_needs():
    batches = list(stream(2.0, "steady"))
    M = sum(x.T @ x for x in batches)
    share = torch.linalg.eigvalsh(M).flip(0).cumsum(0) / M.trace()
    for wanted in (0.7, 0.9):
        values, _, captured = sketched(batches, wanted).eigen()
        assert captured[0] >= wanted
        best = int((share < wanted).sum()) + 1
        assert best <= values.shape[1] <= best + 1  # at most one more than the whole spectrum would need
        assert (values[0, 1:].sum() / M.trace()) < wanted
    columns, _ = sketch_size(0.9999, WIDTH)
    assert columns == 32 and sketched(batches, 0.9999).eigen()[0].shape[1] == 32  # out of reach: all there is


# ---- on a model -----------------------------------------------------------------------------------------------------
WIDE = dict(hidden_size=64, moe_intermediate_size=48, shared_expert_intermediate_size=20, head_dim=12)


class Allocations(TorchDispatchMode):
    """The shapes of all tensors that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("options", [dict(), dict(hessian_structure="ekfac"), dict(token_setting="reduce", fisher="mc")])
def test_low_rank_never_allocates_a_square_factor_or_an_experts_jacobian(options):
    """Through fit, restarts, evidence, tuning and prediction, with all of a layer's experts together or one."""
    model = tiny_model(**WIDE)
    (E, d, f), batches = (4, 64, 48), [tiny_batch(6, length=9, seed=s) for s in range(8)]
    factors, jacobians = {(d, d), (f, f)}, {(d, f), (f, d)}  # a matrix d x f alone is an expert's weight

    def seen(rank):
        la = bm.ExpertLaplace(model, rank=rank, **options)
        with Allocations() as watch:
            la.fit(batches, progress=False)
            la.optimize_prior_precision()
            la.predictive_logits(batches[0])
        return {s for s in watch.shapes if s[-2:] in factors or len(s) > 2 and s[-2:] in jacobians}

    assert not seen(3)
    assert {(E, d, d), (E, f, f)} <= seen(None)  # the watch sees them where they are


def test_low_rank_posterior_is_the_one_of_its_own_curvature():
    """Evidence and predictive against the dense inverse of ``H^ + lambda I``, the complement at the prior."""
    d, f, lam = 32, 24, 0.3
    model = tiny_model(hidden_size=d, moe_intermediate_size=f)
    batches, test = [tiny_batch(6, seed=s) for s in range(4)], tiny_batch(3, seed=9)
    for structure in ("kron", "ekfac"):
        la = bm.ExpertLaplace(model, hessian_structure=structure, rank=3, prior_precision=lam).fit(batches, progress=False)
        assert all(p.eigenvalues.shape == (4, 3, 3) for p in la.posteriors)
        with capturing(model):
            mean, captured = la.captured(test)
        expected, penalty = 0.0, 0.0
        for p, (s, g), distance in zip(la.posteriors, captured, la._distance):
            for e in range(4):
                U = torch.kron(p.basis_g[e], p.basis_a[e])
                precision = (U * p.eigenvalues[e].flatten()) @ U.T + lam * torch.eye(d * f, dtype=torch.float64)
                J = torch.zeros(3, 4, d * f, dtype=torch.float64)
                for t in (s.expert == e).nonzero().flatten():
                    J[s.item[t]] += torch.stack([torch.outer(x[t], s.a[t]).flatten() for x in g])
                root = torch.linalg.cholesky(precision)
                expected = expected + J @ torch.cholesky_solve(J.flatten(0, 1).T, root).T.view_as(J).mT
                penalty += 0.5 * (lam * distance[e] + 2 * root.diagonal().log().sum() - d * f * torch.tensor(lam, dtype=torch.float64).log())
        torch.testing.assert_close(la.predictive_logits(test)[1], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(la.log_marginal_likelihood(), la.log_likelihood - penalty, rtol=1e-9, atol=1e-9)


def test_captured_energy_is_reported_kept_and_warned_about(tmp_path):
    model, batches = tiny_model(**WIDE), [tiny_batch(6, seed=s) for s in range(4)]
    la = bm.ExpertLaplace(model, rank=3).fit(batches, progress=False)
    energy = la.captured_energy
    assert energy.shape == (2, 4, 2) and ((0 < energy) & (energy <= 1 + 1e-12)).all()
    la.save(tmp_path / "posterior")
    assert torch.equal(bm.ExpertLaplace.load(tmp_path / "posterior", model).captured_energy, energy)
    full = bm.ExpertLaplace(model).fit(batches, progress=False)
    assert (full.captured_energy == 1).all()
    A = torch.stack([p.eigenvalues[:, -1] for p in full.posteriors])  # the profile along A
    best = A[..., -3:].sum(-1) / A.sum(-1)
    assert (energy[..., 0] <= best + 1e-9).all() and (energy[..., 0] > 0.8 * best).all()  # a dozen samples an expert: few restarts
    with pytest.warns(UserWarning, match="hold less than that share"):
        bm.ExpertLaplace(model, rank=0.999999).fit(batches, progress=False)
    none = bm.ExpertLaplace(model, rank=3).fit([tiny_batch(1, length=1, ragged=False)], progress=False)
    assert torch.equal(none.captured_energy[..., 0].isnan(), none.tokens_per_expert == 0)


@pytest.mark.parametrize("rank, message", [(0, "rank=0 must"), (49, "between 1 and the smallest factor width, 48"), (1.0, "fraction"),
                                           (-0.5, "fraction"), (float("nan"), "fraction")])
def test_ranks_that_make_no_sense_are_named(rank, message):
    with pytest.raises(ValueError, match=message):
        bm.ExpertLaplace(tiny_model(**WIDE), rank=rank)
