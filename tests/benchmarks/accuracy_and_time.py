"""What each curvature is worth and what it costs: the error of its predictive covariance against the dense GGN's, and its time.

On a small model trained on the embedded world, so that spectra and confidences are those of a trained one. The reference is the dense
GGN over all weights of all experts at once, inverted exactly; error is ``|S - S_exact|_F / |S_exact|_F`` of a question's C x C
covariance, the median over test questions, all at one prior precision (the evidence's choice for the Kronecker posterior). Time is
that of the whole fit, all passes and what follows them, and of the predictions, as ratios to the floors of ``curvature_floor.py``
over the same questions, measured in turn.

    python tests/benchmarks/accuracy_and_time.py [--repeats 3] [--out accuracy.json]
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
from common import add_out, timed, write
from curvature_floor import floor

import bmoe_utils as bm
from bmoe_utils.experts.capture import capturing
from bmoe_utils.experts.exact import joint_predictive, prior_predictive

# name -> options; "rank": of the factors' width, the ladder of low ranks
VARIANTS = {
    "full": dict(hessian_structure="full"),
    "ekfac": dict(hessian_structure="ekfac"),
    "kron": {},
    "kron, active tokens": dict(token_setting="active"),
    "kron, MC Fisher": dict(fisher="mc"),
    "diag": dict(hessian_structure="diag"),
    **{f"kron, rank {r}": dict(rank=r) for r in (4, 8, 16, 32)},
    **{f"ekfac, rank {r}": dict(rank=r, hessian_structure="ekfac") for r in (4, 8, 16, 32)},
}
MODEL = {"width": 96, "expert_width": 64, "experts": 8, "layers": 2, "top_k": 2, "train_size": 300, "seeds": [0], "eval_batch": 20}


def joined(said) -> torch.Tensor:
    """The covariances of all batches, ``[N, C, C]`` float64: 0 where an item has fewer options."""
    parts = [cov.double() for _, cov in said]
    C = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, C - p.shape[1]) * 2) for p in parts])


def errors(covariances: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Median and the central 80% over questions."""
    distance = (covariances - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return [float(distance.quantile(q)) for q in (0.5, 0.1, 0.9)]


def frobenius(la, dense) -> float:
    """``|H - H_dense|_F / |H_dense|_F`` over all experts' blocks, without forming one: ``H_dense = V diag(h) V^T``, so that
    ``<H, H_dense> = sum_r h_r <V_r, H V_r>``."""
    distance = whole = 0.0
    for p, blocks in zip(la.posteriors, dense.posteriors, strict=True):
        for e, (h, V) in enumerate(zip(blocks.values, blocks.vectors, strict=True)):
            J = V.mT.reshape(len(h), p.eigenvalues.shape[1] if p.basis_g is None else p.basis_g.shape[1], -1)  # [R, d, f]
            J = J if p.basis_a is None else p.basis_g[e].mT @ J @ p.basis_a[e]
            inner = float((h.double() * (J.double().square() * p.eigenvalues[e]).sum((1, 2))).sum())
            size = float(h.double().square().sum())
            distance += size + float(p.eigenvalues[e].double().square().sum()) - 2 * inner
            whole += size
    return (max(distance, 0.0) / whole) ** 0.5


def measure(args) -> dict:
    study = bm.Study("smoke", overrides=MODEL)
    model = study.map_model(0)
    fit_on = list(study.loader(study.train_items(0)))
    items = list(study.loader(study.task["test"].subset(args.items)))
    la = bm.ExpertLaplace(model).fit(fit_on, progress=False)
    precision, answer_only = float(la.optimize_prior_precision(granularity="global")), la.answer_only

    reference = bm.ExpertLaplace(model, prior_precision=precision)
    exact = []
    dense_seconds = timed("cpu", lambda: exact.extend(joint_predictive(reference, fit_on, items, progress=False)))
    exact, prior = joined(exact), joined(prior_predictive(reference, items, progress=False))

    fits = {name: [] for name in VARIANTS}
    predictions = {name: [] for name in VARIANTS}
    error, ggn_error, floors = {}, {}, {"fit, exact": [], "fit, mc": [], "predict": []}
    for _ in range(args.repeats):
        with capturing(model):
            for name, columns, data in (("fit, exact", lambda C: C - 1, fit_on), ("fit, mc", lambda C: 1, fit_on), ("predict", int, items)):
                narrow = answer_only if name == "predict" else ()
                floors[name].append(timed("cpu", lambda: [floor(model, b, columns(b["option_ids"].shape[1]), answer_only=narrow) for b in data]))
        for name, options in VARIANTS.items():
            la = bm.ExpertLaplace(model, prior_precision=precision, **options)
            fits[name].append(timed("cpu", lambda: la.fit(fit_on, progress=False)))
            said = []
            predictions[name].append(timed("cpu", lambda: said.extend(la.predictive_logits(batch) for batch in items)))
            error[name] = errors(joined(said), exact)
            if options.get("hessian_structure") == "full":
                dense = la
            else:
                ggn_error[name] = frobenius(la, dense)
    rows = {"no curvature": dict(zip(("error", "error_low", "error_high"), errors(prior, exact)))}
    for name, options in VARIANTS.items():
        against = floors[f"fit, {options.get('fisher', 'exact')}"]
        rows[name] = dict(zip(("error", "error_low", "error_high"), error[name])) | {
            "ggn_error": ggn_error.get(name, 0.0), "fit_seconds": statistics.median(fits[name]),
            "fit_ratio": statistics.median(x / y for x, y in zip(fits[name], against)),
            "fit_in_exact_floors": statistics.median(x / y for x, y in zip(fits[name], floors["fit, exact"])),
            "predict_seconds": statistics.median(predictions[name]),
            "predict_ratio": statistics.median(x / y for x, y in zip(predictions[name], floors["predict"]))}
    return {"settings": {"repeats": args.repeats, "fit_items": sum(len(b["labels"]) for b in fit_on), "items": args.items, "model": MODEL,
                         "prior_precision": precision, "test_nll": study.map_predictions(0).summary()["nll"]},
            "floors": {k: statistics.median(v) for k, v in floors.items()},
            "dense_seconds": dense_seconds, "rows": rows}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", type=int, default=100)
    add_out(parser, "accuracy_and_time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = measure(args)
    print(f"{'':22}  error   (80% of questions)   fit / floor  predict / floor  GGN, Frobenius")
    for name, row in report["rows"].items():
        print(f"{name:22}  {row['error']:.3f}   {row['error_low']:.3f} - {row['error_high']:.3f}" +
              (f"   {row['fit_ratio']:10.2f}  {row['predict_ratio']:10.2f}  {row['ggn_error']:12.3f}" if "fit_ratio" in row else ""))
    write(args.out, "accuracy_and_time", report, argv=argv)
    return report


if __name__ == "__main__":
    main()
