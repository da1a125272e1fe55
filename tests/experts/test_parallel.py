"""Several gloo processes on the CPU fit one posterior: that of one process on all the data, or a clear error on every rank."""

import json
import os
import signal
import socket
import time
import traceback
import warnings
from datetime import timedelta

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DataLoaderConfiguration
from test_ekfac import dense
from test_sketch import WIDE
from tiny import single_items, tiny_batch, tiny_model
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import bmoe_utils as bm
from bmoe_utils.experts import fitting, sketch
from bmoe_utils.experts.parallel import Ranks
from bmoe_utils.experts.sums import KronSums

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_available(), reason="needs processes that start at once")
BATCHES = [tiny_batch(n, length=5, seed=s) for s, n in enumerate((4, 2, 4, 3, 1, 4, 4))]
STRUCTURES = {
    "kron": dict(), "mc": dict(fisher="mc"), "empirical": dict(fisher="empirical"), "reduce": dict(token_setting="reduce"),
    "active": dict(token_setting="active"), "ekfac": dict(hessian_structure="ekfac"),
    "ekfac-mc-active": dict(hessian_structure="ekfac", fisher="mc", token_setting="active"),
    "diag": dict(hessian_structure="diag"), "full": dict(hessian_structure="full"),
    "rank": dict(rank=2), "energy": dict(rank=0.9, fisher="mc"), "ekfac-rank": dict(hessian_structure="ekfac", rank=2),
}
SOME = ("kron", "ekfac-mc-active", "full", "rank", "energy")


class Killed(BaseException):
    pass


def on_ranks(folder, function, size=2, timeout=20, dying=(), initialise=True):
    """``function(rank)`` in ``size`` processes of one gloo group; what each returned (JSON values), by rank. Those of ``dying`` end by
    a signal."""
    children = []
    folder.mkdir(exist_ok=True)
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if initialise:
                    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                                            timeout=timedelta(seconds=timeout))
                (folder / f"{rank}.json").write_text(json.dumps(function(rank)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    states = [os.waitpid(child, 0)[1] for child in children]
    (folder / "store").unlink(missing_ok=True)
    for rank, status in enumerate(states):
        assert os.WIFSIGNALED(status) if rank in dying else status == 0, (rank, status)
    return [None if rank in dying else json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def fit(model, batches, group="world", **options):
    kept = {k: options.pop(k) for k in ("memory_budget", "checkpoint", "every") if k in options}
    return bm.ExpertLaplace(model, **options).fit(batches, group=group, progress=False, **kept)


def same_bits(one, other):
    assert (one.num_items, one.log_likelihood) == (other.num_items, other.log_likelihood)
    assert torch.equal(one.tokens_per_expert, other.tokens_per_expert) and one.answer_only == other.answer_only
    for p, q in zip(one.posteriors, other.posteriors, strict=True):
        assert p.tensors().keys() == q.tensors().keys()
        assert all(torch.equal(v.nan_to_num(-1), q.tensors()[k].nan_to_num(-1)) for k, v in p.tensors().items())
    return True


def same_to_rounding(one, other):
    """Counts, and every expert's dense curvature. Sums of some hundred terms in another order, and eigenvectors of them: 1e-10 of the
    largest entry is a thousand times what is seen."""
    assert one.num_items == other.num_items and torch.equal(one.tokens_per_expert, other.tokens_per_expert)
    assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-12)
    for p, q in zip(one.posteriors, other.posteriors, strict=True):
        if getattr(p, "basis_a", 0) is None:  # diag
            torch.testing.assert_close(p.eigenvalues, q.eigenvalues, rtol=1e-10, atol=0)
            continue
        for e in range(4):
            H = dense(q, e)
            assert (dense(p, e) - H).abs().max() <= 1e-10 * H.abs().max()
    torch.testing.assert_close(one.captured_energy, other.captured_energy, rtol=1e-10, atol=1e-10, equal_nan=True)
    return True


@pytest.mark.parametrize("shards", [2, 3, "uneven", "first empty", "last empty"])
def test_the_posterior_is_that_of_one_process_and_has_the_same_bits_on_all_ranks(shards, tmp_path, monkeypatch):
    """Three ranks are more than there are layers. Drawn labels are the same too, since each depends on its item alone; sketches, as
    long as none has restarted."""
    monkeypatch.setattr(sketch, "FIRST_RESTART", 1e9)
    model, names = tiny_model(), STRUCTURES if shards == 2 else SOME
    size = shards if isinstance(shards, int) else 2
    split = {"uneven": [BATCHES[5:6], BATCHES[:5] + BATCHES[6:]], "first empty": [[], BATCHES], "last empty": [BATCHES, []]}.get(
        shards, [BATCHES[r::size] for r in range(size)])

    def run(rank):
        for name in names:
            fit(model, split[rank], **STRUCTURES[name]).save(tmp_path / f"{name}-{rank}")

    on_ranks(tmp_path / "run", run, size)
    for name in names:
        parts = [bm.ExpertLaplace.load(tmp_path / f"{name}-{rank}", model) for rank in range(size)]
        assert all(same_bits(parts[0], part) for part in parts[1:])
        assert same_to_rounding(parts[0], fit(model, BATCHES, group=None, **STRUCTURES[name])), name


def test_layers_in_groups_and_unlabelled_items(tmp_path):
    """One unlabelled item on one rank leaves no evidence on any."""
    model = tiny_model()
    need = fitting.factor_bytes(bm.ExpertLaplace(model).options, (4, 16, 6), torch.zeros(0, dtype=torch.float64))
    shards = [BATCHES[:3], [BATCHES[3] | {"labels": torch.full((3,), -1)}]]

    def run(rank):
        la = fit(model, shards[rank], memory_budget=need)
        la.save(tmp_path / f"{rank}")
        return la.log_likelihood

    assert on_ranks(tmp_path / "run", run) == [None, None]
    whole = fit(model, BATCHES[:4], group=None)
    for rank in range(2):
        la = bm.ExpertLaplace.load(tmp_path / f"{rank}", model)
        la.log_likelihood = whole.log_likelihood
        assert same_to_rounding(la, whole)


@pytest.mark.parametrize("size", [2, 3])
def test_restarted_sketches_capture_nearly_what_one_process_does(size, tmp_path):
    """Not the same curvature, since each rank's sketch has followed its own shard; but the same bits on all ranks, none invented, and the
    trace that a factor misses at most 1.1 times one process's (the largest seen here is 1.06; see also test_sketch)."""
    model, batches = tiny_model(**WIDE), [tiny_batch(6, length=9, seed=s) for s in range(9)]
    restarted = []

    def run(rank):
        original = KronSums.summands

        def spying(sums):
            restarted.append(float(sums.G.progress[2]))
            return original(sums)

        KronSums.summands = spying
        fit(model, batches[rank::size], rank=3).save(tmp_path / f"{rank}")
        return restarted

    assert min(min(r) for r in on_ranks(tmp_path / "run", run, size)) >= 1
    parts = [bm.ExpertLaplace.load(tmp_path / f"{rank}", model) for rank in range(size)]
    assert all(same_bits(parts[0], part) for part in parts[1:])
    whole, full = (fit(model, batches, group=None, **o) for o in (dict(rank=3), dict()))
    got, one = parts[0].captured_energy, whole.captured_energy
    assert torch.equal(parts[0].tokens_per_expert, whole.tokens_per_expert)
    assert ((1 - got) < 1.1 * (1 - one)).all() and not torch.equal(got, one)
    A = torch.stack([p.eigenvalues[:, -1] for p in full.posteriors])  # the profile along A
    assert (got[..., 0] <= A[..., -3:].sum(-1) / A.sum(-1)).all()


# ---- what can go wrong ----------------------------------------------------------------------------------------------
def outcome(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.parametrize("where", ["batch", "finish"])
def test_a_rank_that_raises_is_named_on_the_others_and_the_previous_posterior_stays(where, tmp_path):
    """On its way through its shard, or at what it does alone for all. Afterwards the same group fits again."""
    model = tiny_model()

    def run(rank):
        la = bm.ExpertLaplace(model, fisher="empirical").fit(BATCHES[rank::2], group="world", progress=False)
        before, options = la.posteriors, dict(group="world", progress=False)
        broken = [BATCHES[1], BATCHES[3] | {"labels": torch.full((3,), -1)}] if where == "batch" and rank == 1 else BATCHES[rank::2]
        original = KronSums.finish
        if where == "finish" and rank == 1:
            KronSums.finish = lambda self: (_ for _ in ()).throw(MemoryError("no room"))
        said = outcome(lambda: la.fit(broken, **options))
        KronSums.finish = original
        assert la.posteriors is before and la.num_items == 22
        la.fit(BATCHES[rank::2], **options)
        assert all(torch.equal(v, q.tensors()[k]) for p, q in zip(before, la.posteriors) for k, v in p.tensors().items())
        return said

    said = on_ranks(tmp_path / "run", run)
    own = "ValueError: batch 1 has unlabelled items" if where == "batch" else "MemoryError: no room"
    assert said[1].startswith(own)
    assert said[0].startswith(f"RuntimeError: there is no posterior of all ranks' data: rank 1 failed ({own}")


@pytest.mark.parametrize("where", ["batch", "finish"])
def test_a_rank_that_dies_is_a_clear_error_on_the_others_and_the_previous_posterior_stays(where, tmp_path):
    model = tiny_model()

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def run(rank):
        la = bm.ExpertLaplace(model).fit(BATCHES[rank::2], group="world", progress=False)
        before, original = la.posteriors, fitting.read_out
        seen = []
        if rank == 1 and where == "batch":
            fitting.read_out = lambda *a: die() if seen else (seen.append(1), original(*a))[1]
        elif rank == 1:
            KronSums.finish = die
        started = time.monotonic()
        said = outcome(lambda: la.fit(BATCHES[rank::2], group="world", progress=False))
        assert la.posteriors is before and la.num_items == 22 and time.monotonic() - started < 10  # long before any timeout
        return said

    said = on_ranks(tmp_path / "run", run, timeout=60, dying=(1,))[0]
    assert said.startswith("RuntimeError: rank 0 of 2 lost the others: a process has ended")


def test_a_rank_that_is_not_ready_in_time_is_an_error_on_the_others(tmp_path):
    model = tiny_model()

    def slow(rank):
        for batch in BATCHES[rank::2]:
            yield batch
        time.sleep(4 * rank)

    said = on_ranks(tmp_path / "run", lambda rank: outcome(lambda: fit(model, slow(rank))), timeout=1)
    assert all("lost the others" in x and "process group's timeout" in x for x in said)


def test_ranks_that_do_not_fit_together_are_refused_on_all(tmp_path):
    model = tiny_model()

    def run(rank):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = [outcome(lambda: fit(model, BATCHES[rank::2], seed=rank)),
                   outcome(lambda: fit(model, BATCHES[rank::2], layers=[rank])),
                   outcome(lambda: fit(model, BATCHES)),  # the whole set on each
                   outcome(lambda: fit(model, [])),
                   outcome(lambda: fit(model, [BATCHES[0]] if rank else [], memory_budget=1)),
                   outcome(lambda: fit(model, BATCHES[rank:3]))]  # overlapping
        return [out, [str(w.message) for w in said if "repeats" in str(w.message)]]

    (first, warned), (second, quiet) = on_ranks(tmp_path / "run", run)
    assert first == second
    for said, message in zip(first, ["fit different things", "fit different things", "all 2 ranks passed over the same 22 items",
                                     "the loader gave no batch", "memory_budget=1 bytes is less", "fine"], strict=True):
        assert message in said
    assert len(warned) == 1 and warned[0].startswith("6 of the 16 items of all ranks are repeats") and not quiet


def test_a_group_is_needed_and_named(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match="torchrun or accelerate launch"):
        fit(model, BATCHES)

    def run(rank):
        mine = [dist.new_group([r]) for r in range(2)][rank]
        la = fit(model, BATCHES[: 2 + rank], group=mine)  # a posterior each
        alone = fit(model, BATCHES[: 2 + rank], group=None)
        assert same_bits(la, alone)
        return [outcome(lambda: fit(model, BATCHES, group="all")), Ranks(mine).size]

    for said, size in on_ranks(tmp_path / "run", run):
        assert said.startswith("ValueError: group='all' is not None, 'world' or a process group") and size == 1


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def dying_after(batches):
    original, seen = fitting.read_out, []

    def dying(*args):
        seen.append(1)
        if len(seen) > batches:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    fitting.read_out = dying


@pytest.mark.parametrize("options, every, after, left", [
    (dict(rank=2, fisher="mc"), 1, 2, 1), (dict(hessian_structure="full"), 1, 2, 1), (dict(hessian_structure="ekfac"), 1, 2, 4),
    (dict(hessian_structure="ekfac"), 1, 4, 2), (dict(hessian_structure="ekfac"), 4, 5, 3)])
def test_a_fit_on_ranks_goes_on_where_it_was_cut_short(options, every, after, left, tmp_path):
    """A rank is killed in its first or second pass; all that are started again end in the bits of an uninterrupted fit. In the last case
    rank 0 keeps a checkpoint in its second pass and rank 1 is not as far yet: it has the one with which that pass begins."""
    model, folder = tiny_model(), tmp_path / "state"
    shards = [BATCHES[::2], BATCHES[1::2]]  # 4 and 3 batches

    def cut_short(rank):
        if rank == 1:
            dying_after(after)
        return outcome(lambda: fit(model, shards[rank], checkpoint=folder, every=every, **options))

    assert "lost the others" in on_ranks(tmp_path / "one", cut_short, dying=(1,))[0]
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {"rank-0-of-2", "rank-1-of-2"}

    def run(rank):
        seen, original = [], fitting.read_out
        fitting.read_out = lambda *a: (seen.append(1), original(*a))[1]
        fit(model, shards[rank], checkpoint=folder, every=every, **options).save(tmp_path / f"resumed-{rank}")
        done = len(seen)
        fit(model, shards[rank], **options).save(tmp_path / f"whole-{rank}")
        return done

    assert on_ranks(tmp_path / "two", run)[1] == left  # what its checkpoint holds is not done again
    assert not folder.exists()
    for rank in range(2):
        assert same_bits(*(bm.ExpertLaplace.load(tmp_path / f"{kind}-{rank}", model) for kind in ("resumed", "whole")))


def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path):
    """Of another number of ranks, of one process, or cut short between two passes."""
    model, folder = tiny_model(), tmp_path / "state"
    options = dict(hessian_structure="ekfac", checkpoint=folder, every=1)

    def between_passes(rank):
        original = fitting.Fit._save
        if rank == 1:
            fitting.Fit._save = lambda self: os.kill(os.getpid(), signal.SIGKILL) if self.stage else original(self)
        return outcome(lambda: fit(model, BATCHES[rank::2], **options))

    on_ranks(tmp_path / "one", between_passes, dying=(1,))
    said = on_ranks(tmp_path / "two", lambda rank: outcome(lambda: fit(model, BATCHES[rank::2], **options)))
    assert said[0] == said[1] and "checkpoints stand in different passes (1, 0)" in said[0]
    for x in on_ranks(tmp_path / "three", lambda rank: outcome(lambda: fit(model, BATCHES[rank::3], **options)), 3):
        assert "something else than checkpoints of 3 ranks" in x
    with pytest.raises(ValueError, match="no whole checkpoint"):
        fit(model, BATCHES, group=None, **options)


# ---- loaders --------------------------------------------------------------------------------------------------------
def test_as_launched_and_with_accelerates_loader(tmp_path):
    """The environment that torchrun and accelerate launch set. Seven items on two ranks: accelerate's shards with even_batches=False hold
    each once; torch's sampler repeats one, and that is said."""
    model, items = tiny_model(), [x for s in range(7) for x in single_items(tiny_batch(1, length=5, seed=s))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def loader(**options):
        return DataLoader(items, 1, collate_fn=lambda rows: {k: torch.cat([r[k] for r in rows]) for k in rows[0]}, **options)

    def launched(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        accelerate.state.PartialState._reset_state()  # what this process's parent may have made
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
        assert accelerator.num_processes == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fit(model, accelerator.prepare(loader())).save(tmp_path / f"{rank}")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert fit(model, loader(sampler=DistributedSampler(items, shuffle=False))).num_items == 8
        return [str(w.message) for w in said if "items" in str(w.message)]

    said = on_ranks(tmp_path / "run", launched, initialise=False)
    assert said[0][0].startswith("1 of the 8 items of all ranks are repeats") and not said[1]
    whole = fit(model, items, group=None)
    for rank in range(2):
        assert same_to_rounding(bm.ExpertLaplace.load(tmp_path / f"{rank}", model), whole)
