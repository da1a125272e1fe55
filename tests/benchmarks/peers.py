"""What other libraries need for a posterior over the same experts, and what they cannot do, measured.

laplace-torch (kron; its backends on curvlinops and on ASDL), bayesian_lora and curvlinops see ``nn.Linear`` modules alone, so time is
measured on an unfused twin of the model: the same weights, every expert a module of its own, the routed experts' second layers as
their only parameters. Everything is in turn on the same batch, the least of several tries, and given as a ratio to the floors of
``curvature_floor.py`` on the twin, as is this study's own posterior. The shape is smaller than there: laplace-torch's Jacobians of
that one take 19 GB.

What cannot be done is tried on tiny models, and what came of it is written down: the error, or the number that shows it.

    python tests/benchmarks/peers.py [--rounds 2] [--tries 3] [--out peers.json]
"""

from __future__ import annotations

import argparse
import importlib
import traceback
import warnings
from collections.abc import Callable

import torch
from common import C, add_out, batches, build, in_turn, silent, table_of, traced, write
from curvature_floor import fit_step, predict, restarts
from test_unfused import unfused
from tiny import tiny_batch, tiny_model
from torch import nn

import bmoe_utils as bm
from bmoe_utils.experts.capture import capturing
from bmoe_utils.models.layers import expert_layers
from bmoe_utils.models.readout import option_logits

PEERS = {"laplace-torch": "laplace", "curvlinops": "curvlinops", "bayesian_lora": "bayesian_lora"}
# Seconds a batch from which a row is timed once: short ones take the least of --tries, since a neighbour's use of the caches weighs on them.
SLOW = 1.0
# The names of a twin's linear layers. bayesian_lora takes Jacobians of parameters with "lora" in their name only.
NAMES = {"down": ("gate_proj", "up_proj", "down_proj"), "lora": ("gate_proj", "up_proj", "down_proj_lora")}


def missing() -> dict[str, str]:
    """Peer -> why it cannot be imported, of those that cannot."""
    out = {}
    for peer, module in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except Exception as error:
            out[peer] = f"{type(error).__name__}: {error}".splitlines()[0]
    return out


# ---- the peers' own calls -------------------------------------------------------------------------------------------
class ReadOut(nn.Module):
    """A model of a batch that gives its class logits, as laplace-torch and curvlinops want it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return option_logits(self.model, batch)


class Loader(list):
    """A list of batches with the ``dataset`` that laplace-torch asks for the number of items."""

    @property
    def dataset(self):
        return range(sum(len(batch["labels"]) for batch in self))


def only_experts(model: nn.Module, keyword: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(".experts." in name and keyword in name)
    return model.eval()


def laplace_torch(model: nn.Module, fisher: str = "exact", backend: str = "curvlinops"):
    from laplace import Laplace
    from laplace.curvature.asdl import AsdlGGN
    from laplace.curvature.curvlinops import CurvlinopsGGN
    la = Laplace(ReadOut(only_experts(model, "down_proj")), "classification", subset_of_weights="all", hessian_structure="kron",
                 backend={"curvlinops": CurvlinopsGGN, "asdl": AsdlGGN}[backend], backend_kwargs={"stochastic": fisher == "mc"})
    return la


def fit_curvlinops(model: nn.Module, data: list[dict], fisher: str = "exact"):
    from curvlinops import KFACLinearOperator
    whole = ReadOut(only_experts(model, "down_proj"))
    operator = KFACLinearOperator(
        whole, nn.CrossEntropyLoss(reduction="sum"), [p for p in whole.parameters() if p.requires_grad],
        [(batch, batch["labels"]) for batch in data], fisher_type={"exact": "type-2", "mc": "mc"}[fisher], check_deterministic=False,
        batch_size_fn=lambda batch: len(batch["labels"]))
    operator.compute_kronecker_factors()
    return operator


def fit_bayesian_lora(model: nn.Module, data: list[dict], rank: int | None = None):
    from bayesian_lora import calculate_kronecker_factors
    only_experts(model, "down_proj")
    return calculate_kronecker_factors(model, option_logits, data, n_kfac=rank, lr_threshold=0 if rank else 10**9,
                                       target_module_keywords=["experts"] if not has_modules(model) else ["down_proj"])


def has_modules(model: nn.Module) -> bool:
    return any(isinstance(m, nn.ModuleList) for m in expert_layers(model).values())


# ---- time and memory ------------------------------------------------------------------------------------------------
def floor_of(model: nn.Module) -> Callable[[dict, int], None]:
    """A forward and ``K`` backward passes to the twin's expert outputs, which hooks keep: no token is told from another."""
    outputs: list[torch.Tensor] = []

    def keep(module, args, output):
        outputs.append(output if output.requires_grad else output.requires_grad_())

    for experts in expert_layers(model).values():
        for expert in experts:
            expert.down_proj.register_forward_hook(keep)

    def run(batch: dict, K: int) -> None:
        outputs.clear()
        logits = option_logits(model, batch)
        for k in range(K):
            torch.autograd.grad(logits, outputs, torch.eye(C)[k].expand_as(logits), retain_graph=k + 1 < K, materialize_grads=True)

    return run


def measure(args, absent: dict) -> dict:
    """Rows as in ``curvature_floor.py``; those of a peer that is not there are left out."""
    shape = {k: getattr(args, k) for k in ("d", "f", "experts", "layers", "top_k")}
    data = batches(args.rounds, args.batch)

    def twin(way: str = "sorted", names: str = "down") -> nn.Module:
        return unfused(build("qwen2_moe", **shape), way, NAMES[names])

    model, plain = twin(), twin()
    rows: dict[str, tuple[str | None, Callable]] = {}
    with capturing(model), capturing(plain), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own, about hooks and deprecated calls
        floor = floor_of(plain)
        for name, K in (("floor of a fit, mc", 1), ("floor of a fit, exact", C - 1), ("floor of a prediction", C)):
            rows[name] = None, lambda batch, K=K: floor(batch, K)
        for name, options in (("full factors", {}), (f"rank {args.rank}", {"rank": args.rank})):
            for fisher in ("mc", "exact"):
                la = bm.ExpertLaplace(model, fisher=fisher, **options)
                fit, step, end = fit_step(la)
                step(data[0])
                la.posteriors = end()
                restarts(fit, 1)  # none while it is timed
                rows[f"this study, {name}: fit, {fisher}"] = f"floor of a fit, {fisher}", step
            rows[f"this study, {name}: predict"] = "floor of a prediction", lambda batch, la=la: predict(la, batch)
        if "laplace-torch" not in absent:
            for fisher in ("mc", "exact"):
                la = laplace_torch(twin(), fisher)
                la.fit(Loader(data[:1]))
                rows[f"laplace-torch: fit, {fisher}"] = (
                    f"floor of a fit, {fisher}", lambda batch, la=la: la._curv_closure(batch, batch["labels"], N=len(batch["labels"])))
            rows["laplace-torch: predict"] = "floor of a prediction", la._glm_predictive_distribution
        if "curvlinops" not in absent:
            theirs = twin()
            for fisher in ("mc", "exact"):
                rows[f"curvlinops: fit, {fisher}"] = (
                    f"floor of a fit, {fisher}", lambda batch, fisher=fisher, m=theirs: fit_curvlinops(m, [batch], fisher))
        if "bayesian_lora" not in absent:
            from bayesian_lora.main import jacobian_mean
            looped = twin("loop")  # its hooks need a token dimension
            for name, rank in (("full factors", None), (f"rank {args.rank}", args.rank)):
                rows[f"bayesian_lora, {name}: fit, mc"] = (
                    "floor of a fit, mc", lambda batch, rank=rank: fit_bayesian_lora(looped, [batch], rank))
            named = only_experts(twin(names="lora"), "down_proj_lora")
            rows["bayesian_lora: Jacobian alone"] = "floor of a prediction", lambda batch: jacobian_mean(
                named, {k: batch[k] for k in ("input_ids", "attention_mask")},
                output_callback=lambda out: out.logits[:, -1, 10 : 10 + C])  # the option tokens of common.batches

        peaks = {name: traced("cpu", lambda: run(data[0]))[0] for name, (_, run) in rows.items()}  # and warmed up
        times = in_turn("cpu", {name: run for name, (_, run) in rows.items()}, data, args.tries, SLOW)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return table_of({name: against for name, (against, _) in rows.items()}, times, peaks, parameters)


# ---- what cannot be done --------------------------------------------------------------------------------------------
def outcome(run: Callable[[], object]) -> dict:
    """``{"result": ...}``, or ``{"error": ...}``: what it raised, or that it ended the interpreter."""
    try:
        with silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"result": run()}
    except SystemExit:
        return {"error": "SystemExit: it ends the Python process"}
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else traceback.extract_tb(error.__traceback__)[-1].line
        return {"error": f"{type(error).__name__}: {said.partition('. ')[0]}"}


def factors(la) -> list:
    return la.H_facs.kfacs


def fitted(la, data: list[dict]):
    la.fit(Loader(data))
    return la


def trace(la) -> float:
    """Of laplace-torch's curvature, a Kronecker product for every expert."""
    return sum(float(G.trace() * A.trace()) for G, A in factors(la))


def own(model: nn.Module, data: list[dict], structure: str = "kron"):
    return bm.ExpertLaplace(model, hessian_structure=structure).fit(data, progress=False)


def own_trace(model: nn.Module, data: list[dict], structure: str = "kron") -> float:
    return sum(float(p.eigenvalues.sum()) for p in own(model, data, structure).posteriors)


def padded(batch: dict, by: int) -> dict:
    """The same items behind so much more padding."""
    wider = {k: nn.functional.pad(batch[k], (by, 0)) for k in ("input_ids", "attention_mask")}
    return batch | wider


def facts(absent: dict) -> dict:
    """What came of each attempt, by kind and library; on tiny float64 models of 2 layers x 4 experts."""
    fresh = lambda way="sorted": unfused(tiny_model(), way, NAMES["down"])  # noqa: E731  hooks of a failed attempt stay behind
    many, few = tiny_batch(8, length=12, ragged=False, seed=1), tiny_batch(1, length=2, ragged=False, seed=3)
    experts = 8
    reached = [e for e, n in enumerate(own(fresh(), [few]).tokens_per_expert.flatten().tolist()) if n]
    tries: dict[str, dict[str, Callable]] = {
        "fused experts: factors found, of 8 experts": {"this study": lambda: sum(len(p.eigenvalues) for p in own(tiny_model(), [many]).posteriors)},
        "unfused experts, called with tokens [n, width]: factors found": {
            "this study": lambda: sum(len(p.eigenvalues) for p in own(fresh(), [many]).posteriors)},
        f"a batch that reaches {len(reached)} of 8 experts, then one that reaches all: factors found": {
            "this study": lambda: sum(len(p.eigenvalues) for p in own(fresh(), [few, many]).posteriors)},
        "the same, experts called with no token: factors found": {
            "this study": lambda: sum(len(p.eigenvalues) for p in own(fresh("loop"), [few, many]).posteriors)},
        "12 more padding tokens an item: trace of the curvature, in units of that without": {
            "this study": lambda: own_trace(fresh(), [padded(many, 12)]) / own_trace(fresh(), [many])},
        "trace of the curvature, in units of the exact GGN's": {
            "this study": lambda: own_trace(fresh(), [many]) / own_trace(fresh(), [many], "diag")},
        "share of A's trace that enters the factor": {"this study": lambda: 1.0},
    }
    fused, flat, absentees, empty, padding, scale, tokens = tries.values()
    if "laplace-torch" not in absent:
        for backend, name in (("curvlinops", "laplace-torch"), ("asdl", "laplace-torch (ASDL)")):
            fused[name] = lambda b=backend: len(factors(fitted(laplace_torch(tiny_model(), backend=b), [many])))
            flat[name] = lambda b=backend: len(factors(fitted(laplace_torch(fresh(), backend=b), [many])))
            absentees[name] = lambda b=backend: len(factors(fitted(laplace_torch(fresh(), backend=b), [few, many])))
            empty[name] = lambda b=backend: len(factors(fitted(laplace_torch(fresh("loop"), backend=b), [few, many])))
            padding[name] = lambda b=backend: (trace(fitted(laplace_torch(fresh(), backend=b), [padded(many, 12)]))
                                               / trace(fitted(laplace_torch(fresh(), backend=b), [many])))
            scale[name] = lambda b=backend: trace(fitted(laplace_torch(fresh(), backend=b), [many])) / own_trace(fresh(), [many], "diag")
    if "curvlinops" not in absent:
        covariances = lambda operator: len(operator._gradient_covariances)  # noqa: E731
        total = lambda data: sum(float(G.trace() * o._input_covariances[n].trace())  # noqa: E731
                                 for o in [fit_curvlinops(fresh(), data)] for n, G in o._gradient_covariances.items())
        fused["curvlinops"] = lambda: covariances(fit_curvlinops(tiny_model(), [many]))
        flat["curvlinops"] = lambda: covariances(fit_curvlinops(fresh(), [many]))
        absentees["curvlinops"] = lambda: covariances(fit_curvlinops(fresh(), [few, many]))
        empty["curvlinops"] = lambda: covariances(fit_curvlinops(fresh("loop"), [few, many]))
        padding["curvlinops"] = lambda: total([padded(many, 12)]) / total([many])
        scale["curvlinops"] = lambda: total([many]) / own_trace(fresh(), [many], "diag")
    if "bayesian_lora" not in absent:
        fused["bayesian_lora"] = lambda: len(fit_bayesian_lora(tiny_model(), [many]))
        flat["bayesian_lora"] = lambda: len(fit_bayesian_lora(fresh(), [many]))
        empty["bayesian_lora"] = lambda: len(fit_bayesian_lora(fresh("loop"), [few, many]))

        def last_tokens_alone() -> float:
            of_slots = sum(float(g.M.diagonal(dim1=1, dim2=2).sum()) for g in input_grams(fresh("loop"), many))
            return sum(float(A.trace()) for A, _ in fit_bayesian_lora(fresh("loop"), [many]).values()) / of_slots

        tokens["bayesian_lora"] = last_tokens_alone
    out = {what: {library: outcome(run) for library, run in by_library.items()} for what, by_library in tries.items()}
    if (said := absent_shift(out, experts, reached)) is not None:
        out["of these, factors that add up two different experts' curvature"] = {"laplace-torch (ASDL)": {"result": said}}
    return out


def input_grams(model: nn.Module, batch: dict) -> list:
    """The factors A of this study, one running sum a layer."""
    with capturing(model):
        fit, step, _ = fit_step(bm.ExpertLaplace(model))
        step(batch)
    return [sums.A for sums in fit.sums]


def absent_shift(out: dict, experts: int, reached: list[int]) -> int | None:
    """With the ASDL backend, factors are added by position: how many of those it returned are of two experts at once."""
    found = next((by["laplace-torch (ASDL)"].get("result") for what, by in out.items()
                  if what.startswith("a batch") and "laplace-torch (ASDL)" in by), None)
    return None if found is None or found == experts else sum(e != i for i, e in enumerate(reached[:found]))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d", 256), ("f", 176), ("experts", 8), ("layers", 2), ("top-k", 2), ("rank", 64), ("batch", 8), ("rounds", 2),
                          ("tries", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_out(parser, "peers")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    absent = missing()
    report = {"settings": {k: v for k, v in vars(args).items() if k != "out"}, "not_installed": absent, "rows": measure(args, absent),
              "facts": facts(absent)}
    for peer, why in absent.items():
        print(f"{peer} is left out: {why} (tests/benchmarks/peers.txt lists what to install)")
    width = max(map(len, report["rows"]))
    print(f"{'':{width}}  s/batch   ratio  peak MB  memory")
    for name, row in report["rows"].items():
        ratios = f"{row['ratio']:6.2f}  {row['peak_mb']:7.0f}  {row['memory_ratio']:6.2f}" if "ratio" in row else f"{'':6}  {row['peak_mb']:7.0f}"
        print(f"{name:{width}}  {row['seconds_per_batch']:7.3f}  {ratios}")
    for what, by_library in report["facts"].items():
        print(f"\n{what}")
        for library, said in by_library.items():
            print(f"  {library:22} {said.get('error', said.get('result'))}")
    write(args.out, "peers", report, argv=argv, packages=("laplace-torch", "bayesian-lora", "curvlinops-for-pytorch", "asdfghjkl"))
    return report


if __name__ == "__main__":
    main()
