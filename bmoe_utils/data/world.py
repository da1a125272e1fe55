"""The embedded world: everyday facts with known uncertainty, so that the true p*(y|x) of every question is known.

`world.json` gives each (concept, relation) pair a distribution over one-word values. This module reads and checks
it, writes seeded pretraining text whose next-word distribution is that p*, and draws seeded multiple-choice questions
whose labels are *sampled* from p* restricted to the choices: the noise in the labels is real, and its size is known.
"""
from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

SIZES = {"train": 2000, "validation": 500, "test": 2000, "near": 600, "wording": 600, "far": 600}
PAIR_SHARES = {"train": 0.45, "validation": 0.12, "test": 0.43}    # of the common main pairs, within every relation
CHOICE_COUNTS = {4: 0.8, 3: 0.1, 5: 0.1}
DISTRACTORS = {0: 0.65, 1: 0.28, 2: 0.07}                          # choices of probability zero; at least two are possible
RARE_PER_CATEGORY, RARE_SEED = 2, 28

_WORD, _NAME = re.compile(r"[a-z]+"), re.compile(r"[a-z]+( [a-z]+)?")
_WORDING = re.compile(r"[a-z ,'{}]+[.?]")
_SLOTS = {"statements": ("{c}", "{v}"), "questions": ("{c}",), "held_out": ("{c}",)}


class WorldError(ValueError):
    """The world file is broken, or more was asked of the world than it holds; the message says where."""


@dataclass(frozen=True)
class Concept:
    name: str                                                      # one or two words: "polar bear"
    phrase: str                                                    # with its article: "a polar bear", "rain", "the flu"
    category: str
    domain: str                                                    # "main" or "far"


@dataclass(frozen=True)
class Relation:
    name: str
    domain: str
    statements: tuple[str, ...]                                    # wordings with {c} and {v}
    questions: tuple[str, ...]                                     # wordings with {c}, used in pretraining and most splits
    held_out: tuple[str, ...]                                      # question wordings of the split "wording" alone


class World:
    """Concepts, relations and p*. Built from the parsed world file; raises `WorldError` on anything malformed.

    `concepts` and `relations` map a name to its `Concept` or `Relation`, in the order of the file; `pairs` lists every
    (concept, relation) that has a distribution; `rare` names the near-shift concepts, the same on every load: two of each
    main category, scarce in pretraining and absent from train, validation and test.
    """

    def __init__(self, data: Mapping):
        for key in ("relations", "categories", "concepts"):
            _require(key in data, f"missing section {key!r}")
        self.relations: dict[str, Relation] = {k: _relation(k, r) for k, r in data["relations"].items()}
        seen: dict[str, str] = {}
        for rel in self.relations.values():
            for wording in rel.questions + rel.held_out:
                _require(wording not in seen, f"question wording {wording!r} of {rel.name!r} is already one of {seen.get(wording)!r}")
                seen[wording] = rel.name

        categories = data["categories"]
        usual: dict[str, dict[str, dict[str, float]]] = {}
        for name, category in categories.items():
            _require(category.get("domain") in ("main", "far"), f"category {name!r}: domain must be 'main' or 'far'")
            _require(bool(category.get("usual")), f"category {name!r}: missing section 'usual'")
            usual[name] = {r: self._normalised(f"category {name!r}", r, w) for r, w in category["usual"].items()}
            for r in usual[name]:
                _require(self.relations[r].domain == category["domain"], f"category {name!r}: relation {r!r} is of another domain")

        self.concepts: dict[str, Concept] = {}
        self._p: dict[tuple[str, str], dict[str, float]] = {}
        for entry in data["concepts"]:
            name, category = entry.get("name", ""), entry.get("category")
            _require(bool(_NAME.fullmatch(name)), f"concept {name!r}: a name is one or two words of letters a-z")
            _require(name not in self.concepts, f"concept {name!r} appears twice")
            _require(category in categories, f"concept {name!r}: unknown category {category!r}")
            article = entry.get("article", "an" if name[0] in "aeiou" else "a")
            _require(article in ("a", "an", "the", ""), f"concept {name!r}: unknown article {article!r}")
            self.concepts[name] = Concept(name, f"{article} {name}".strip(), category, categories[category]["domain"])
            own = {r: self._normalised(f"concept {name!r}", r, w) for r, w in entry.get("facts", {}).items()}
            for r in own:
                _require(r in usual[category], f"concept {name!r}: relation {r!r} does not apply to category {category!r}")
            for r, p in usual[category].items():
                self._p[name, r] = own.get(r, p)

        self.pairs: list[tuple[str, str]] = list(self._p)
        self.rare: tuple[str, ...] = self._choose_rare()
        # Wrong choices come from the same category where possible: knowing the category is then not enough.
        self._values: dict[tuple[str, str], list[str]] = {}
        for (c, r), p in self._p.items():
            for key in ((self.concepts[c].category, r), ("", r)):
                known = self._values.setdefault(key, [])
                known.extend(v for v in p if v not in known)

    def distribution(self, concept: str, relation: str) -> dict[str, float]:
        """p*(value | concept, relation) over all its values, summing to 1. KeyError if the relation does not apply."""
        return dict(self._p[concept, relation])

    def domain(self, concept: str) -> str:
        """"main" or "far"."""
        return self.concepts[concept].domain

    def vocabulary(self, relation: str, category: str = "") -> list[str]:
        """Every value of the relation, in one category or, by default, in all of them."""
        return list(self._values.get((category, relation), ()))

    def _normalised(self, where: str, relation: str, weights: Mapping) -> dict[str, float]:
        _require(relation in self.relations, f"{where}: unknown relation {relation!r}")
        where = f"{where}, {relation}"
        _require(isinstance(weights, Mapping), f"{where}: weights must be an object of value: weight, got {weights!r}")
        _require(len(weights) >= 2, f"{where}: at least two values are needed, got {list(weights)}")
        for value, w in weights.items():
            _require(bool(_WORD.fullmatch(value)), f"{where}: value {value!r} is not one word of letters a-z")
            number = isinstance(w, (int, float)) and not isinstance(w, bool)
            _require(number and 0 < w < math.inf, f"{where}: the weight of {value!r} must be a positive number, got {w!r}")
        total = math.fsum(weights.values())
        return {v: w / total for v, w in weights.items()}

    def _choose_rare(self) -> tuple[str, ...]:
        rng, members = np.random.default_rng(RARE_SEED), {}
        for c in self.concepts.values():
            if c.domain == "main":
                members.setdefault(c.category, []).append(c.name)
        return tuple(names[i] for names in members.values() for i in rng.permutation(len(names))[:RARE_PER_CATEGORY])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WorldError(message)


def _relation(name: str, entry: Mapping) -> Relation:
    _require(entry.get("domain") in ("main", "far"), f"relation {name!r}: domain must be 'main' or 'far'")
    for kind, slots in _SLOTS.items():
        _require(bool(entry.get(kind)), f"relation {name!r}: missing wording, {kind!r} is absent or empty")
        for wording in entry[kind]:
            fine = _WORDING.fullmatch(wording) and sorted(re.findall(r"{.*?}", wording)) == sorted(slots)
            _require(bool(fine), f"relation {name!r}, {kind}: {wording!r} must be lower-case ascii, end in . or ?, "
                                 f"and hold {' and '.join(slots)} once")
    return Relation(name, entry["domain"], *(tuple(entry[kind]) for kind in _SLOTS))


def world_file() -> Path:
    """Where the world is written down: `world.json` beside this module."""
    return Path(__file__).resolve().with_name("world.json")


def load_world(path: str | Path | None = None) -> World:
    """Read and check a world file (default: `world.json` beside this module).

    Raises FileNotFoundError, or `WorldError` naming the file and the place in it that is wrong.
    """
    path = Path(path) if path is not None else world_file()

    def no_duplicates(items: list[tuple[str, object]]) -> dict:
        found = dict(items)
        if len(found) < len(items):                                # json keeps the last one silently; the file is edited by hand
            keys = [k for k, _ in items]
            raise WorldError(f"given twice: {sorted({k for k in keys if keys.count(k) > 1})}")
        return found

    try:
        return World(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates))
    except ValueError as err:                                      # also of the JSON or of its encoding
        raise WorldError(f"{path}: {'' if isinstance(err, WorldError) else 'not valid JSON: '}{err}") from err


def cloze_prompt(question: str) -> str:
    """The prompt after which the next word is the answer (with its leading space)."""
    return f"Question: {question}\nAnswer:"


def pretraining_lines(world: World, n: int, seed: int = 0, rare_weight: float = 0.12, far_share: float = 0.08) -> list[str]:
    """`n` seeded strings, about half statements ("rain needs clouds.") and half answered cloze prompts (of two lines each).

    Values are drawn from the full p*, so a model of this text has p* as its next-word distribution. Among main lines a
    pair of a rare concept is `rare_weight` times as frequent as another; `far_share` of the lines is of the far domain.
    """
    if not (rare_weight >= 0 and 0 <= far_share <= 1):
        raise ValueError(f"rare_weight must be >= 0 and far_share in [0, 1], got {rare_weight} and {far_share}")
    rng, is_far = np.random.default_rng(seed), np.array([world.domain(c) == "far" for c, _ in world.pairs])
    weight = np.where(is_far, 0.0, [rare_weight if c in world.rare else 1.0 for c, _ in world.pairs])
    pair_p = (1 - far_share) * weight / weight.sum()
    if far_share:
        _require(bool(is_far.any()), "far_share > 0, but this world has no far domain")
        pair_p += far_share * is_far / is_far.sum()
    tables = []                                                    # per pair: phrase, relation, values, cumulative p*
    for c, r in world.pairs:
        p = world.distribution(c, r)
        tables.append((world.concepts[c].phrase, world.relations[r], list(p), list(accumulate(p.values()))))

    lines, u = [], rng.random((n, 3))                              # [n, 3]: value, statement or question, wording
    for k, (u_value, u_kind, u_wording) in zip(rng.choice(len(pair_p), size=n, p=pair_p), u):
        phrase, rel, values, cumulative = tables[k]
        value = values[min(bisect_right(cumulative, u_value), len(values) - 1)]
        wordings = rel.statements if u_kind < 0.5 else rel.questions
        text = wordings[int(u_wording * len(wordings))].replace("{c}", phrase)
        lines.append(text.replace("{v}", value) if u_kind < 0.5 else f"{cloze_prompt(text)} {value}")
    return lines


def build_splits(world: World, seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, list[dict]]:
    """Seeded multiple-choice questions: train, validation, test, near, wording, far, each in random order.

    An item is `{"id", "question", "choices": [3 to 5 distinct words], "answer": int, "p_star": [floats, one per choice],
    "concept", "relation"}`; `p_star` is p* restricted to the choices and renormalised, `answer` is sampled from it.
    `sizes` replaces some of `SIZES`; another split's size never changes a split's items.

    Train, validation and test share no (concept, relation) pair, so no noisy label seen in training speaks about a test
    pair. `near` asks about rare concepts only, `far` about the far domain, `wording` about test pairs in held-out words.
    Raises `WorldError` for an unknown split, a negative size, or more items than the pairs can give.
    """
    unknown = set(sizes or ()) - set(SIZES)
    _require(not unknown, f"unknown split {sorted(unknown)}; there are {list(SIZES)}")
    sizes = {**SIZES, **(sizes or {})}
    pools = _divide_pairs(world, np.random.default_rng([seed, len(SIZES)]))
    splits = {}
    for i, (name, pool) in enumerate(pools.items()):
        items = _draw_items(world, name, pool, sizes[name], np.random.default_rng([seed, i]))
        splits[name] = [{"id": f"{name}-{k:05d}", **item} for k, item in enumerate(items)]
    return splits


def _divide_pairs(world: World, rng: np.random.Generator) -> dict[str, list[tuple[str, str]]]:
    pools: dict[str, list] = {name: [] for name in SIZES}
    bounds = list(accumulate(PAIR_SHARES.values()))
    for relation in world.relations:                               # by relation, so that each split has the same mix of them
        common = [(c, r) for c, r in world.pairs if r == relation and world.domain(c) == "main" and c not in world.rare]
        order = rng.permutation(len(common))
        for rank, i in enumerate(order):
            name = list(PAIR_SHARES)[bisect_right(bounds[:-1], (rank + 0.5) / len(common))]
            pools[name].append(common[i])
    pools["near"] = [(c, r) for c, r in world.pairs if c in world.rare]
    pools["far"] = [(c, r) for c, r in world.pairs if world.domain(c) == "far"]
    pools["wording"] = list(pools["test"])
    return pools


def _draw_items(world: World, name: str, pool: list, size: int, rng: np.random.Generator, patience: int = 20) -> list[dict]:
    _require(size >= 0, f"split {name!r}: the size must not be negative, got {size}")
    items, seen, active = [], set(), list(pool)
    while len(items) < size:
        _require(bool(active), f"split {name!r}: {size} distinct items asked, its {len(pool)} pairs gave {len(items)}")
        still = []                                                 # pairs take turns, so that their counts differ by one at most
        for k in rng.permutation(len(active)):
            for _ in range(patience):
                item = _draw_item(world, *active[k], name == "wording", rng)
                key = (item["question"], frozenset(item["choices"]))
                if key not in seen:
                    seen.add(key)
                    items.append(item)
                    still.append(active[k])
                    break
        active = still
    # The last turn overshoots; its order is random, so cutting favours no pair.
    return [items[k] for k in rng.permutation(size)]


def _pick(rng: np.random.Generator, shares: Mapping[int, float]) -> int:
    """One key, with probability its share; a share of zero is never picked, however the sums round."""
    keys = [k for k, share in shares.items() if share > 0]
    cumulative = list(accumulate(shares[k] for k in keys))
    return keys[min(bisect_right(cumulative, rng.random() * cumulative[-1]), len(keys) - 1)]


def _draw_item(world: World, concept: str, relation: str, held_out: bool, rng: np.random.Generator) -> dict:
    p, rel = world.distribution(concept, relation), world.relations[relation]
    n, wrong = _pick(rng, CHOICE_COUNTS), _pick(rng, DISTRACTORS)
    possible = list(p)
    n_possible = min(max(2, n - wrong), len(possible))
    tempered = np.sqrt(list(p.values()))                           # likely values are offered more often, but not always
    choices = [possible[i] for i in rng.choice(len(possible), n_possible, replace=False, p=tempered / tempered.sum())]
    for category in (world.concepts[concept].category, ""):
        if len(choices) < n:
            others = [v for v in world.vocabulary(relation, category) if v not in p and v not in choices]
            choices += [others[i] for i in rng.permutation(len(others))[:n - len(choices)]]
    choices = [choices[i] for i in rng.permutation(len(choices))]
    mass = np.array([p.get(v, 0.0) for v in choices])
    p_star = mass / mass.sum()
    wordings = rel.held_out if held_out else rel.questions
    question = wordings[int(rng.integers(len(wordings)))].replace("{c}", world.concepts[concept].phrase)
    return {"question": question, "choices": choices, "answer": _pick(rng, dict(enumerate(p_star.tolist()))),
            "p_star": p_star.tolist(), "concept": concept, "relation": relation}


def describe(world: World, splits: Mapping[str, Sequence[dict]]) -> dict:
    """Counts of the world, and per split what the oracle p* achieves.

    `bayes_accuracy` is the mean of max p*, `entropy` the mean entropy of p* in nats (both without reference to the labels),
    `entropy_q05` and `entropy_q95` its spread, `label_nll` the NLL of p* on the sampled labels, `choices` the count of
    items by their number of choices.
    """
    domains = [c.domain for c in world.concepts.values()]
    out = {"concepts": domains.count("main"), "far_concepts": domains.count("far"), "rare_concepts": len(world.rare),
           "categories": len({c.category for c in world.concepts.values()}), "relations": len(world.relations),
           "pairs": len(world.pairs), "values": len({v for r in world.relations for v in world.vocabulary(r)}), "splits": {}}
    for name, items in splits.items():
        if not items:
            out["splits"][name] = {"items": 0}
            continue
        entropy = [-math.fsum(p * math.log(p) for p in item["p_star"] if p > 0) for item in items]
        counts = [len(item["choices"]) for item in items]
        pairs = {(item["concept"], item["relation"]) for item in items}
        q05, q95 = np.quantile(entropy, (0.05, 0.95))
        out["splits"][name] = {
            "items": len(items), "pairs": len(pairs), "concepts": len({c for c, _ in pairs}),
            "bayes_accuracy": float(np.mean([max(item["p_star"]) for item in items])),
            "entropy": float(np.mean(entropy)), "entropy_q05": float(q05), "entropy_q95": float(q95),
            "label_nll": float(np.mean([-math.log(item["p_star"][item["answer"]]) for item in items])),
            "choices": {n: counts.count(n) for n in sorted(set(counts))}}
    return out
