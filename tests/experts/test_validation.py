"""Prior precisions by validation NLL: coordinate descent that changes one summand a trial, against one that sums all anew."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

import bmoe_utils as bm
from bmoe_utils.experts import prior, validation
from bmoe_utils.experts.curvature import probit_probabilities, sample_probabilities
from bmoe_utils.experts.validation import ValidationNLL

GRID = len(prior.COARSE)


def problem(groups, batches=((3, 4), (5, 3)), seed=0, dtype=torch.float32):
    """Batches ``(mean, labels, parts [grid, groups, B, C, C])`` of other widths; a group meets some of the items, the last none."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for B, C in batches:
        root = torch.randn(groups, B, C, C, generator=g, dtype=dtype) * 3 * torch.rand(groups, 1, 1, 1, generator=g, dtype=dtype)
        root = root * (torch.rand(groups, B, 1, 1, generator=g) < 0.6) * (torch.arange(groups) < groups - 1)[:, None, None, None]
        scale = 10 * torch.rand(groups, generator=g, dtype=dtype)
        shrink = scale / (scale + 100 * (prior.COARSE.to(dtype)[:, None] / 1e2))
        parts = (root @ root.mT) * shrink[:, :, None, None, None]
        out.append((2 * torch.randn(B, C, generator=g, dtype=dtype), torch.randint(0, C, (B,), generator=g), parts))
    return out


def fast(batches, link, memory_budget=2**31):
    groups = batches[0][2].shape[1]
    nll = ValidationNLL(torch.arange(groups)[None], link, 3, memory_budget)
    for mean, labels, parts in batches:
        nll.add(mean, labels, [parts])
    return nll.ready()


def plain(batches, link):
    """``nll(choice)`` of a table of everything, and the descent by it."""
    width = max(m.shape[1] for m, _, _ in batches)
    wide = lambda x, axes, value=0.0: torch.nn.functional.pad(x, (0, width - x.shape[-1]) * axes, value=value)  # noqa: E731
    mean = torch.cat([wide(m, 1, -torch.inf) for m, _, _ in batches])
    labels = torch.cat([y for _, y, _ in batches])
    table = torch.cat([wide(p, 2) for _, _, p in batches], 2)
    n = table.shape[1]

    def nll(choice):
        cov = table[choice, torch.arange(n)].sum(0)
        p = (mean.softmax(-1) if link == "map" else probit_probabilities(mean, cov) if link == "probit"
             else sample_probabilities(mean, cov, 100, torch.Generator().manual_seed(3)))
        return float(-p.gather(1, labels[:, None]).log().mean())

    def descent(sweeps=5):
        common = [nll(torch.full((n,), i)) for i in range(GRID)]
        least = min(common)
        choice = torch.full((n,), common.index(least))
        for _ in range(sweeps if n > 1 else 0):
            before = least
            for which in range(n):
                for i in range(GRID):
                    trial = choice.clone()
                    trial[which] = i
                    if (value := nll(trial)) < least:
                        least, choice = value, trial
            if least == before:
                break
        return common, choice

    return nll, descent


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("link, dtype", [("mc", torch.float32), ("mc", torch.float64), ("map", torch.float32)])
def test_few_groups_to_the_bit(groups, link, dtype):
    batches = problem(groups, dtype=dtype)
    common, choice = plain(batches, link)[1]()
    nll = fast(batches, link)
    assert nll.common() == common
    assert torch.equal(nll.minimise(progress=False), choice)
    if link == "mc" and groups > 1:
        assert choice.unique().numel() > 1


@pytest.mark.parametrize("block", [1, 3, 32])
def test_many_groups_choose_the_same(block, monkeypatch):
    """In float64, where what another order of the sum changes is far below what the points of the grid differ by."""
    monkeypatch.setattr(validation, "BLOCK", block)
    batches = problem(14, seed=1, dtype=torch.float64)
    evaluate, descent = plain(batches, "probit")
    common, choice = descent()
    nll = fast(batches, "probit")
    torch.testing.assert_close(torch.tensor(nll.common()), torch.tensor(common))
    got = nll.minimise(progress=False)
    assert torch.equal(got, choice) and choice.unique().numel() > 2
    assert evaluate(got) < min(common) - 1e-3


def test_what_has_no_room_in_memory_is_in_files(monkeypatch):
    batches, files = problem(5), []
    monkeypatch.setattr(validation, "TemporaryFile", lambda *a, make=validation.TemporaryFile, **k: files.append(make(*a, **k)) or files[-1])
    whole = fast(batches, "mc")
    assert not files
    bounded = fast(batches, "mc", memory_budget=whole.tables[0].nbytes)  # room for the first batch alone
    assert len(files) == 1 and bounded.common() == whole.common()
    assert torch.equal(bounded.minimise(progress=False), whole.minimise(progress=False))


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(validation.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        fast(problem(5), "mc", memory_budget=0)


def test_a_trial_asks_for_the_items_that_met_its_group(monkeypatch, capsys):
    la = bm.ExpertLaplace(tiny_model(dtype=torch.float32)).fit([tiny_batch(8)], progress=False)
    calls = []
    monkeypatch.setattr(validation, "probit_probabilities", lambda m, c: calls.append(len(c)) or probit_probabilities(m, c))
    best = la.optimize_prior_precision("val_nll", "expert", val_loader=[tiny_batch(6, seed=3)], link_approx="probit", memory_budget=0)
    assert best.shape == (2, 4)
    assert "prior precisions, sweep 1" in capsys.readouterr().err  # the bar
    assert len(calls) <= GRID * (1 + 5 * 8)
    # each of six items meets two of the last layer's four experts, at its answer: three items an expert, but for what has none
    assert sum(n < 6 for n in calls[GRID:]) >= GRID * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Parts and NLL are float32."""
    la = bm.ExpertLaplace(tiny_model(dtype=dtype, scale=0.2)).fit([tiny_batch(8)], progress=False)
    nll = la._validation_nll(prior.groups("expert", 2, 4), [tiny_batch(6, seed=3)], "mc", False)
    assert nll.tables[0].dtype == nll.mean.dtype == torch.float32
    assert nll.minimise(progress=False).shape == (8,)


def test_no_items():
    la = bm.ExpertLaplace(tiny_model()).fit([tiny_batch(8)], progress=False)
    with pytest.raises(ValueError, match="no batch"):
        la.optimize_prior_precision("val_nll", val_loader=[], progress=False)
