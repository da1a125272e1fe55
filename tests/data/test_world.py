"""The embedded world: p* is what the file says, labels are drawn from it, and no split leaks into another."""
import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bmoe_utils.data.world import (
    DISTRACTORS,
    SIZES,
    World,
    WorldError,
    build_splits,
    cloze_prompt,
    describe,
    load_world,
    pretraining_lines,
)

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "bmoe_utils" / "data" / "world.json"
N_LINES = 40_000


@pytest.fixture(scope="module")
def raw():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def splits(world):
    return build_splits(world)


@pytest.fixture(scope="module")
def lines(world):
    return pretraining_lines(world, N_LINES)


@pytest.fixture(scope="module")
def true_p(raw):
    """p* of every pair, recomputed from the file alone: own weights if there are any, else the category's."""
    out = {}
    for entry in raw["concepts"]:
        for relation, usual in raw["categories"][entry["category"]]["usual"].items():
            weights = entry["facts"].get(relation) or usual
            out[entry["name"], relation] = {v: w / sum(weights.values()) for v, w in weights.items()}
    return out


@pytest.fixture(scope="module")
def parsed(world, true_p, lines):
    """Every line as (concept, relation, value, "statement" or "question"), looked up among all lines that may occur."""
    possible = {}
    for (c, r), p in true_p.items():
        rel = world.relations[r]
        forms = [(s, "statement") for s in rel.statements] + [(f"Question: {q}\nAnswer: {{v}}", "question") for q in rel.questions]
        for form, kind in forms:
            for v in p:
                text = form.replace("{c}", world.concepts[c].phrase).replace("{v}", v)
                assert text not in possible               # a line is of exactly one relation
                possible[text] = (c, r, v, kind)
    return [possible[line] for line in lines]


def pairs_of(items):
    return {(i["concept"], i["relation"]) for i in items}


# --- the file and the world ----------------------------------------------------------------------------------------

def test_the_world_is_as_large_as_promised(raw, world):
    domains = Counter(c.domain for c in world.concepts.values())
    assert domains["main"] >= 200 and domains["far"] >= 40
    relations = Counter(r.domain for r in world.relations.values())
    assert relations["main"] == 10 and relations["far"] == 5
    for rel in world.relations.values():
        assert len(rel.statements) >= 3 and len(rel.questions) >= 4 and len(rel.held_out) >= 2
    own = sum(len(e["facts"]) for e in raw["concepts"])
    assert own > 0.8 * len(world.pairs)                    # facts are mostly the concept's, not its category's


def test_every_value_is_one_word_and_p_star_is_the_files(true_p, world):
    assert set(world.pairs) == set(true_p)
    for concept, relation in world.pairs:
        p = world.distribution(concept, relation)
        assert all(re.fullmatch(r"[a-z]+", v) for v in p)
        assert math.isclose(sum(p.values()), 1, abs_tol=1e-12)
        assert p == pytest.approx(true_p[concept, relation], abs=1e-12)


def test_distributions_differ_within_a_category(world):
    """Otherwise a model could learn categories and ignore the concepts."""
    for relation in world.relations:
        by_category = {}
        for c, r in world.pairs:
            if r == relation:
                p = world.distribution(c, r)
                by_category.setdefault(world.concepts[c].category, set()).add(tuple(sorted(p.items())))
        for category, distinct in by_category.items():
            members = sum(world.concepts[c].category == category for c, r in world.pairs if r == relation)
            assert len(distinct) > members / 2, (category, relation)


def test_the_domains_share_words_but_no_relation(world):
    values = {d: {v for r in world.relations.values() if r.domain == d for v in world.vocabulary(r.name)} for d in ("main", "far")}
    assert len(values["main"] & values["far"]) >= 30
    assert {r for c, r in world.pairs if world.domain(c) == "main"}.isdisjoint(r for c, r in world.pairs if world.domain(c) == "far")


def test_rare_concepts_are_spread_over_the_main_categories(world):
    assert len(world.rare) == len(set(world.rare)) == 28
    assert set(Counter(world.concepts[c].category for c in world.rare).values()) == {2}
    assert all(world.domain(c) == "main" for c in world.rare)
    assert world.rare == load_world().rare


def test_articles(world):
    phrase = {name: c.phrase for name, c in world.concepts.items()}
    assert (phrase["robin"], phrase["owl"], phrase["rain"], phrase["ukulele"], phrase["flu"]) == (
        "a robin", "an owl", "rain", "a ukulele", "the flu")


# --- pretraining text ----------------------------------------------------------------------------------------------

def test_cloze_prompt_is_the_questions_format(lines):
    assert cloze_prompt("where can you find rain?") == "Question: where can you find rain?\nAnswer:"
    assert all(re.fullmatch(r"Question: [a-z ,]+\?\nAnswer: [a-z]+|[a-z ,]+\.", line) for line in lines)


def test_frequencies_of_rare_far_and_kind(world, parsed):
    """Counts within 5 binomial standard deviations of their design."""
    n_rare = sum(c in world.rare for c, _ in world.pairs)
    n_common = sum(world.domain(c) == "main" and c not in world.rare for c, _ in world.pairs)
    rare = 0.92 * 0.12 * n_rare / (0.12 * n_rare + n_common)
    design = {"far": 0.08, "rare": rare, "statement": 0.5}
    seen = {"far": sum(world.domain(c) == "far" for c, *_ in parsed), "rare": sum(c in world.rare for c, *_ in parsed),
            "statement": sum(kind == "statement" for *_, kind in parsed)}
    for key, share in design.items():
        assert abs(seen[key] - N_LINES * share) < 5 * math.sqrt(N_LINES * share * (1 - share)), key


def test_values_in_the_text_follow_p_star(true_p, parsed):
    """The mean log p* of the values must be minus the mean entropy of their pairs, within 5 standard errors, for statements
    and questions apart; `parsed` has already refused values outside the support."""
    entropy = {pair: -sum(q * math.log(q) for q in p.values()) for pair, p in true_p.items()}
    for kind in ("statement", "question"):
        excess = [-math.log(true_p[c, r][v]) - entropy[c, r] for c, r, v, k in parsed if k == kind]
        assert abs(np.mean(excess)) < 5 * np.std(excess) / math.sqrt(len(excess))


def test_held_out_wordings_stay_out_of_the_text(world, lines):
    asked = {line.split("\n")[0].removeprefix("Question: ") for line in lines if line.startswith("Question")}
    held = {w.replace("{c}", c.phrase) for r in world.relations.values() for w in r.held_out for c in world.concepts.values()}
    assert asked.isdisjoint(held)


def test_held_out_wordings_use_known_words(world, lines):
    """So that the split tests new phrasing, and not words the tokenizer or the model has never met."""
    known = set(re.findall("[a-z]+", " ".join(lines)))
    assert not {w for r in world.relations.values() for q in r.held_out for w in re.findall("[a-z]+", q.replace("{c}", ""))} - known


def test_the_text_is_seeded(world, lines):
    assert pretraining_lines(world, 500, seed=3) == pretraining_lines(world, 500, seed=3) != pretraining_lines(world, 500, seed=4)
    assert pretraining_lines(world, 0) == []
    with pytest.raises(ValueError, match="far_share"):
        pretraining_lines(world, 10, far_share=1.5)


def test_shares_can_be_switched_off(world):
    text = "\n".join(pretraining_lines(world, 3000, rare_weight=0.0, far_share=0.0))
    assert not re.search(r"patient|doctors", text)
    for rel in world.relations.values():                   # whole wordings: "a car" is rare, the start of "a carrot" is not
        for name in world.rare:
            assert not any(w.replace("{c}", world.concepts[name].phrase) in text for w in rel.questions)


# --- splits --------------------------------------------------------------------------------------------------------

def test_sizes_ids_and_option_counts(splits):
    assert {k: len(v) for k, v in splits.items()} == SIZES
    assert SIZES["train"] >= 1600 and SIZES["validation"] >= 400 and SIZES["test"] >= 1500
    assert min(SIZES[k] for k in ("near", "wording", "far")) >= 500
    for name, items in splits.items():
        assert [i["id"] for i in items] == [f"{name}-{k:05d}" for k in range(len(items))]
    counts = Counter(len(i["choices"]) for items in splits.values() for i in items)
    total = sum(counts.values())
    for n, share in {3: 0.1, 4: 0.8, 5: 0.1}.items():
        assert abs(counts[n] - share * total) < 5 * math.sqrt(total * share * (1 - share))
    assert set(counts) == {3, 4, 5}


def test_items_are_well_formed_and_p_star_is_right(true_p, world, splits):
    vocabulary = {r: set(world.vocabulary(r)) for r in world.relations}
    for items in splits.values():
        for i in items:
            assert set(i) == {"id", "question", "choices", "answer", "p_star", "concept", "relation"}
            assert len(set(i["choices"])) == len(i["choices"]) == len(i["p_star"])
            assert type(i["answer"]) is int and all(type(p) is float for p in i["p_star"])
            assert world.concepts[i["concept"]].phrase in i["question"]
            p = true_p[i["concept"], i["relation"]]
            mass = [p.get(v, 0.0) for v in i["choices"]]
            assert i["p_star"] == pytest.approx([m / sum(mass) for m in mass], abs=1e-12)
            assert sum(m > 0 for m in mass) >= 2 and sum(m == 0 for m in mass) <= max(DISTRACTORS)
            assert i["p_star"][i["answer"]] > 0
            assert set(i["choices"]) <= vocabulary[i["relation"]]


@pytest.mark.parametrize("split", list(SIZES))
def test_labels_are_sampled_from_p_star(splits, split):
    """Two checks, each within 4.5 standard errors under p*: the labels' mean log-likelihood against minus the mean entropy
    (catches argmax or flattened labels), and the hits of the most likely choice against the mean of max p* (a z-score
    of a sum of independent Bernoullis). Together 12 looks at fixed seeds: a false alarm has probability below 1e-4."""
    excess, variance, hits, expected, spread = [], 0.0, 0, 0.0, 0.0
    for i in splits[split]:
        p = np.array(i["p_star"])
        logp = np.log(np.where(p > 0, p, 1))
        mean = (p * logp).sum()
        excess.append(logp[i["answer"]] - mean)
        variance += (p * (logp - mean) ** 2).sum()
        hits += int(p[i["answer"]] == p.max())
        top = p[p == p.max()].sum()                        # ties count together
        expected, spread = expected + top, spread + top * (1 - top)
    assert abs(sum(excess)) < 4.5 * math.sqrt(variance)
    assert abs(hits - expected) < 4.5 * math.sqrt(spread)


def test_the_answers_position_says_nothing(splits):
    place = Counter(i["answer"] for items in splits.values() for i in items if len(i["choices"]) == 4)
    n = sum(place.values())
    # p* is known and the order of the choices is random, so the place of the sampled answer is uniform.
    assert all(abs(place[k] - n / 4) < 4.5 * math.sqrt(n * 3 / 16) for k in range(4))


def test_train_validation_and_test_share_no_pair(splits):
    train, validation, test = (pairs_of(splits[k]) for k in ("train", "validation", "test"))
    assert not (train & validation or train & test or validation & test)


def test_no_item_is_in_two_places(splits):
    keys = Counter((i["question"], frozenset(i["choices"])) for items in splits.values() for i in items)
    assert max(keys.values()) == 1


def test_shifted_splits_are_what_they_say(world, splits):
    for name in ("train", "validation", "test", "wording"):
        assert not {i["concept"] for i in splits[name]} & set(world.rare)
        assert {world.domain(i["concept"]) for i in splits[name]} == {"main"}
    assert {i["concept"] for i in splits["near"]} == set(world.rare)
    assert {world.domain(i["concept"]) for i in splits["far"]} == {"far"}
    assert pairs_of(splits["wording"]) <= pairs_of(splits["test"])
    for name, items in splits.items():
        for i in items:
            rel = world.relations[i["relation"]]
            wordings = rel.held_out if name == "wording" else rel.questions
            assert i["question"] in {w.replace("{c}", world.concepts[i["concept"]].phrase) for w in wordings}


def test_splits_have_the_same_mix_of_relations(world, splits):
    for r, rel in world.relations.items():
        if rel.domain == "main":
            share = [np.mean([p[1] == r for p in pairs_of(splits[k])]) for k in ("train", "validation", "test")]
            assert max(share) - min(share) < 0.02, (r, share)


def test_sizes_can_be_changed_one_by_one(world, splits):
    other = build_splits(world, sizes={"validation": 7, "train": 0})
    assert len(other["validation"]) == 7 and other["train"] == []
    assert all(other[k] == splits[k] for k in ("test", "near", "wording", "far"))
    with pytest.raises(WorldError, match="unknown split.*tset"):
        build_splits(world, sizes={"tset": 5})
    with pytest.raises(WorldError, match="negative"):
        build_splits(world, sizes={"test": -1})


def test_asking_for_too_much_is_an_error(raw):
    """Three birds, two of them rare: seven pairs are left for validation, and nothing is far."""
    small = World({**raw, "concepts": [e for e in raw["concepts"] if e["category"] == "bird"][:3]})
    none = dict.fromkeys(SIZES, 0)
    with pytest.raises(WorldError, match="'far': 1 distinct items asked, its 0 pairs gave 0"):
        build_splits(small, sizes={**none, "far": 1})
    with pytest.raises(WorldError, match="'validation': 50000 distinct items asked, its 7 pairs gave"):
        build_splits(small, sizes={**none, "validation": 50_000})


# Run by path: the world needs nothing else of the package, and the check stays fast.
DIGEST = """
import hashlib, json, runpy, sys
m = runpy.run_path(sys.argv[1])
w = m["load_world"](sys.argv[2])
made = [m["build_splits"](w, seed=5, sizes=dict.fromkeys(m["SIZES"], 150)), m["pretraining_lines"](w, 2000, seed=5), w.rare]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest(), "torch" in sys.modules)
"""


def test_deterministic_also_under_another_hash_seed(world):
    few = dict.fromkeys(SIZES, 150)
    here = json.dumps([build_splits(world, seed=5, sizes=few), pretraining_lines(world, 2000, seed=5), world.rare])
    there = subprocess.run([sys.executable, "-c", DIGEST, str(ROOT / "bmoe_utils" / "data" / "world.py"), str(FILE)], text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, timeout=300)
    assert there.stdout.split() == [hashlib.sha256(here.encode()).hexdigest(), "False"]
    assert build_splits(world, seed=6, sizes=few) != build_splits(world, seed=5, sizes=few)


def test_describe(world, splits):
    d = describe(world, splits)
    assert d["concepts"] >= 200 and d["far_concepts"] >= 40 and d["pairs"] == len(world.pairs)
    assert set(d["splits"]) == set(splits)
    test = d["splits"]["test"]
    assert test["items"] == len(splits["test"]) and sum(test["choices"].values()) == test["items"]
    assert 0.55 < test["bayes_accuracy"] < 0.65 and 0.85 < test["entropy"] < 1.05          # room between guessing and certainty
    assert test["entropy_q05"] < 0.5 and test["entropy_q95"] > 1.25
    assert describe(world, {"none": []})["splits"]["none"] == {"items": 0}


# --- broken files --------------------------------------------------------------------------------------------------

def _usual(d): return d["categories"]["bird"]["usual"]["colour"]


BROKEN = {
    "value 'dark brown' is not one word": lambda d: _usual(d).update({"dark brown": 3}),
    "value 'Brown' is not one word": lambda d: _usual(d).update({"Brown": 3}),
    "weight of 'brown' must be a positive number": lambda d: _usual(d).update(brown=0),
    "weight of 'grey' must be a positive number": lambda d: _usual(d).update(grey="3"),
    "weights must be an object": lambda d: d["categories"]["bird"]["usual"].update(colour="brown"),
    "at least two values": lambda d: d["categories"]["bird"]["usual"].update(colour={"brown": 1}),
    "category 'bird': unknown relation 'smells'": lambda d: d["categories"]["bird"]["usual"].update(smells={"bad": 1, "good": 1}),
    "relation 'lasts' is of another domain": lambda d: d["categories"]["bird"]["usual"].update(lasts={"days": 1, "years": 1}),
    "concept 'robin': relation 'made_of' does not apply": lambda d: d["concepts"][0]["facts"].update(made_of={"wood": 1, "stone": 1}),
    "concept 'robin': unknown category 'brid'": lambda d: d["concepts"][0].update(category="brid"),
    "concept 'robin' appears twice": lambda d: d["concepts"].append(d["concepts"][0]),
    "name is one or two words": lambda d: d["concepts"][0].update(name="Robin the bird"),
    "unknown article 'some'": lambda d: d["concepts"][0].update(article="some"),
    "relation 'colour': missing wording, 'held_out'": lambda d: d["relations"]["colour"].update(held_out=[]),
    "must be lower-case ascii": lambda d: d["relations"]["colour"]["questions"].append("What colour is {c}?"),
    "hold {c} and {v} once": lambda d: d["relations"]["colour"]["statements"].append("{c} has a colour."),
    "is already one of 'colour'": lambda d: d["relations"]["size"]["held_out"].append(d["relations"]["colour"]["questions"][0]),
    "missing section 'concepts'": lambda d: d.pop("concepts"),
    "category 'bird': domain must be": lambda d: d["categories"]["bird"].update(domain="sky"),
}


@pytest.mark.parametrize("message", list(BROKEN))
def test_a_broken_file_is_named(raw, tmp_path, message):
    data = copy.deepcopy(raw)
    BROKEN[message](data)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(WorldError, match=re.escape(message)) as err:
        load_world(path)
    assert "broken.json" in str(err.value)


def test_truncated_duplicated_and_missing_files(tmp_path):
    text, path = FILE.read_text(encoding="utf-8"), tmp_path / "broken.json"
    path.write_text(text[:5000], encoding="utf-8")
    with pytest.raises(WorldError, match="not valid JSON"):
        load_world(path)
    path.write_text(text.replace('"facts": {', '"category": "bird", "facts": {', 1), encoding="utf-8")
    with pytest.raises(WorldError, match="given twice.*category"):
        load_world(path)
    with pytest.raises(FileNotFoundError):
        load_world(tmp_path / "none.json")
