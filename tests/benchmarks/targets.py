"""Which of the targets that ``data/bench/*.json`` carry are met: what ``make bench`` ends with.

    python tests/benchmarks/targets.py
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "data" / "bench"


def rows_of(report: dict) -> list[tuple[str, float | None, float]]:
    """``(what, measured, target)`` of one benchmark's figures, in its order."""
    out = []
    for architecture, part in report.get("architectures", {}).items():
        for name, row in part["rows"].items():
            if "target" in row:
                out.append((f"{architecture}: {name}, time", row.get("ratio_of_a_whole_fit", row["ratio"]), row["target"]))
            if "memory_target" in row:
                out.append((f"{architecture}: {name}, memory", row["memory_ratio"], row["memory_target"]))
    for model, row in report.get("models", {}).items():
        out += [(f"{model}: {name}", row[name], target) for name, target in row.get("targets", {}).items()]
    return out


def main() -> list[tuple[str, float | None, float]]:
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        found += rows_of(json.loads(path.read_text(encoding="utf-8")))
    print("\n== targets: ratios to the floor of the same run (a fit's with what follows its batches)")
    width = max((len(what) for what, *_ in found), default=0)
    for what, measured, target in found:
        print(f"{what:{width}}  {measured:8.3f}  <= {target:<6g} {'met' if measured <= target else 'MISSED'}")
    if not (FOLDER / "gpu_shapes.json").exists():
        print("gpu_shapes (the papers' models on one GPU): not run; python tests/benchmarks/gpu_shapes.py needs CUDA")
    print(f"{sum(m <= t for _, m, t in found)} of {len(found)} met")
    return found


if __name__ == "__main__":
    main()
