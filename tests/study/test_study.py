"""The pipeline at its smallest: every stage is computed once and found again, and test questions stay out of training."""

import json
import warnings

import numpy as np
import pytest
import torch

import bmoe_utils as bm
from bmoe_utils.data import world
from bmoe_utils.experts import columns, laplace
from bmoe_utils.models import embedded, loading
from bmoe_utils.models import training as train
from bmoe_utils.scores import metrics
from bmoe_utils.scores import predictions as evaluate
from bmoe_utils.study import output
from bmoe_utils.study.output import Store
from bmoe_utils.study.stages import map_model
from bmoe_utils.study.study import PROFILES, Study

TINY = {"width": 16, "layers": 1, "experts": 4, "expert_width": 16, "pretrain_lines": 3000, "pretrain_steps": 3,
        "pretrain_batch": 8, "train_size": 24, "epochs": 2, "test_size": 20, "sizes": [8, 24], "mc_samples": 16, "lr": 1e-2,
        "prior_mean": "pretrained"}


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Fewer of the world's questions."""
    patch, full = pytest.MonkeyPatch(), world.build_splits(world.load_world())
    keep = {"train": 60, "validation": 30, "test": 30, "near": 30}
    patch.setattr("bmoe_utils.data.tasks.build_splits", lambda *_, **__: {k: full[k][:n] for k, n in keep.items()})
    yield full
    patch.undo()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def nothing_is_computed(monkeypatch):
    def forbid():
        def fail(*_, **__):
            raise AssertionError("computed again")

        for module, names in ((train, ("pretrain", "fine_tune")), (embedded, ("build_model", "train_tokenizer")), (map_model, ("predict",)),
                              (bm.ExpertLaplace, ("fit", "optimize_prior_precision", "__call__"))):
            for name in names:
                monkeypatch.setattr(module, name, fail)

    return forbid


def tiny(store, profile="smoke", *, task="world", model=None, **overrides):
    return Study(profile, task=str(task), model=model, overrides=TINY | overrides, store=store)


def yes_no(folder):
    """A user's own questions. ``zebra`` occurs in test alone, ``yak`` in validation alone."""
    folder.mkdir()
    things = ["ice", "fire", "snow", "soot", "lava", "hail", "tea", "ash"]
    rows = lambda items: "".join(json.dumps({"question": q, "choices": ["no", "yes"], "answer": a}) + "\n" for q, a in items)
    asked = [(f"is {t} {p}?", (i + j) % 2) for i, t in enumerate(things) for j, p in enumerate(["cold", "hot", "wet", "black"])]
    (folder / "train.jsonl").write_text(rows(asked))
    (folder / "validation.jsonl").write_text(rows([(f"is a yak {p}?", 0) for p in ("cold", "wet", "black")]))
    (folder / "test.jsonl").write_text(rows([(f"is a zebra {p}?", i % 2) for i, p in enumerate(["cold", "hot", "wet"] * 3)]))
    return folder


def recorded_texts(monkeypatch):
    """Call it for what tokenizer and pretraining were given since, each as one text."""
    seen = {}

    def record(module, name, position):
        original = getattr(module, name)

        def wrapper(*args, **options):
            args = [list(a) if i == position else a for i, a in enumerate(args)]
            seen[name] = "\n".join(args[position])
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    def texts():
        assert list(seen) == ["train_tokenizer", "pretrain"]
        return list(seen.values())

    record(embedded, "train_tokenizer", 0)
    record(train, "pretrain", 2)
    return texts


def numbers(s, seed=0):
    """Everything the first four chapters ask for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # after so little training the evidence may have no optimum inside
        predictions = [s.base_predictions(), s.map_predictions(seed), s.map_predictions(seed, "validation"),
                       s.map_predictions(seed, epochs=1, size=8), s.temperature_predictions(seed)[0], s.laplace_predictions(seed),
                       s.laplace_predictions(seed, hessian_structure="diag", granularity="global", link_approx="probit"),
                       s.laplace_predictions(seed, tune="val_nll", granularity="global")]
        tuned = s.tuned_laplace(seed).prior_precision
        evidence = s.laplace(seed).log_marginal_likelihood()
    return [p.probs for p in predictions] + [tuned.numpy(), evidence.numpy(), np.array(s.temperature_predictions(seed)[1])]


# ---- settings -------------------------------------------------------------------------------------------------------
def test_unknown_profiles_and_parameters_list_the_valid_ones(store):
    with pytest.raises(ValueError, match="'huge'.*smoke, cpu, gpu, paper"):
        Study("huge", store=store)
    with pytest.raises(ValueError) as error:
        Study("cpu", overrides={"epoch": 3, "epochs": 3, "colour": 1}, store=store)
    assert str(error.value).startswith("unknown parameter colour, epoch; ")
    assert all(name in str(error.value) for name in PROFILES["cpu"])


def test_settings_are_those_of_the_profile_then_of_own_questions_then_overrides(store, tmp_path):
    assert len({frozenset(p) for p in PROFILES.values()}) == 1  # every profile has every setting
    assert Study("cpu", store=store).epochs == 20 and Study("cpu", store=store, overrides={"epochs": 7}).epochs == 7
    own = Study("cpu", task="somewhere", store=store, overrides={"layers": 5})
    assert (own.epochs, own.pretrain_steps, own.train_size, own.layers) == (8, 0, None, 5)
    assert Study("cpu", task="somewhere", model="some/checkpoint", store=store).epochs == 20  # not an embedded model
    assert Study("smoke", store=store).embedded and not Study("paper", store=store).embedded


# ---- load or compute ------------------------------------------------------------------------------------------------
def test_a_second_study_computes_nothing_and_says_the_same(store, nothing_is_computed):
    first = numbers(tiny(store))
    finished = sorted(p.name for p in store.root.iterdir() if not p.name.startswith("."))
    nothing_is_computed()
    again = numbers(tiny(store))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert sorted(p.name for p in store.root.iterdir() if not p.name.startswith(".")) == finished
    with pytest.raises(AssertionError, match="computed again"):
        tiny(store).map_predictions(1)


def test_another_store_gives_the_same_numbers(store, tmp_path):
    mine, other = tiny(store), tiny(Store(tmp_path))
    assert mine.map_folder(0).name == other.map_folder(0).name
    assert np.array_equal(mine.map_predictions(0).probs, other.map_predictions(0).probs)
    a, b = mine.map_model(0).state_dict(), other.map_model(0).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_copy_of_a_model_is_its_own(store, method):
    """Read from disk once: what is done to a copy touches neither the next one nor another study's on the same folder."""
    s = tiny(store, method=method)
    for fresh in (lambda: s.map_model(0), lambda: s.base()[0], lambda: s._changed({"eval_batch": 3}).map_model(0)):
        first = fresh()
        before = {k: v.clone() for k, v in first.state_dict().items()}
        with torch.no_grad():
            for p in first.parameters():
                p.add_(1.0)
        first.train()
        second = fresh()
        assert not second.training and all(torch.equal(v, before[k]) for k, v in second.state_dict().items())
    on_disk = tiny(store, method=method).map_model(0).state_dict()
    assert all(torch.equal(v, on_disk[k]) for k, v in s.map_model(0).state_dict().items())


def test_stages_are_what_they_say(store):
    """Not only found again, but right: each against the same thing done by hand."""
    s = tiny(store)
    model, tokenizer = s.base()
    assert json.loads((s.base_folder / "losses.json").read_text())[0] > 3 and len(s.task["test"]) == 20
    loader = bm.make_loader(s.task["test"], tokenizer, batch_size=64)
    np.testing.assert_allclose(s.base_predictions().probs, evaluate.predict(model, loader, progress=False).probs, atol=1e-12)
    train.fine_tune(model, bm.make_loader(s.train_items(0), tokenizer, batch_size=16, shuffle=True, seed=0), epochs=2, lr=1e-2,
                    progress=False)
    mapped = s.map_predictions(0)
    np.testing.assert_allclose(mapped.probs, evaluate.predict(model, loader, progress=False).probs, atol=1e-6)
    assert np.abs(mapped.probs - s.base_predictions().probs).max() > 0.01
    np.testing.assert_array_equal(mapped.labels, [i["answer"] for i in s.task["test"]])
    history = s.map_history(0)
    assert [h["epoch"] for h in history] == [0, 1, 2]
    assert history[-1]["test"]["nll"] == pytest.approx(mapped.summary()["nll"], rel=1e-6)
    assert history[0]["test"]["nll"] == pytest.approx(s.base_predictions().summary()["nll"], rel=1e-6)

    la = bm.ExpertLaplace(model, prior_mean=s.base()[0], seed=0).fit(s.loader(s.train_items(0)), progress=False)
    mine = s.laplace(0)
    assert mine.num_items == 24 and torch.equal(mine.tokens_per_expert, la.tokens_per_expert)
    torch.testing.assert_close(mine.log_marginal_likelihood(2.0), la.log_marginal_likelihood(2.0), rtol=1e-4, atol=1e-4)


def test_laplace_predictions_use_the_tuned_prior_and_the_options(store):
    s = tiny(store)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        la = s.tuned_laplace(0, hessian_structure="diag", granularity="global")
        assert la.options["hessian_structure"] == "diag" and la.prior_precision.shape == () and la.prior_precision != 1
        saved = s.laplace_predictions(0, hessian_structure="diag", granularity="global", link_approx="probit")
        assert s.tuned_laplace(0).prior_precision.shape == (1,)  # by layer
    (batch,) = s.loader(s.task["test"])
    np.testing.assert_allclose(saved.probs, la(batch, link_approx="probit").numpy(), atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*prior precisions reached the end:UserWarning")
def test_a_second_posterior_has_the_first_one_s_jacobians_but_not_another_split_s_or_seed_s(store, monkeypatch):
    s, passes = tiny(store, eval_batch=4), []
    monkeypatch.setattr(laplace, "read_out", lambda *args: passes.append(args) or columns.read_out(*args))
    diagonal = dict(hessian_structure="diag", granularity="global")

    def backward_passes(split, seed=0, **options):
        s.tuned_laplace(seed, **options)
        passes.clear()
        return s.laplace_predictions(seed, split, **options), len(passes)

    first, number = backward_passes("test", granularity="global")
    assert number == len(s.loader(s.task["test"])) > 1
    said, number = backward_passes("test", **diagonal)
    assert number == 0
    la = s.tuned_laplace(0, **diagonal)
    alone = evaluate.predict(lambda batch: la(batch, num_samples=s.mc_samples), s.loader(s.task["test"]))
    np.testing.assert_array_equal(said.probs, alone.probs)
    assert (said.probs != first.probs).any()
    for split, seed in (("validation", 0), ("test", 0), ("test", 1)):  # "test" is by then no longer the last
        assert backward_passes(split, seed, hessian_structure="full")[1] == len(s.loader(s.task[split]))


CHANGES = {"base": {"width": 8, "pretrain_steps": 4, "pretrain_lines": 2900, "architecture": "olmoe", "vocab_size": 4000},
           "map": {"epochs": 3, "lr": 2e-3, "train_size": 23, "batch_size": 8, "weight_decay": 0.1, "method": "lora"},
           "predictions": {"mc_samples": 17, "prior_mean": "zero"}}


def test_a_changed_setting_changes_the_key(store, monkeypatch):
    """Of its own stage and of all that rest on it; and of none before it."""
    def keys(**overrides):
        s, seen = tiny(store, **overrides), {}
        with monkeypatch.context() as patch:
            patch.setattr(store, "folder", lambda kind, config, build, **_: seen.setdefault(
                kind, store.root / f"{kind}-{output.fingerprint(config)}"))
            patch.setattr(evaluate.Predictions, "load", lambda path: path)
            patch.setattr(Study, "tokenizer", None)
            s.laplace_predictions(0)
        return seen

    base = keys()
    assert list(base) == ["base", "map", "predictions"] and keys() == base
    for stage, changes in CHANGES.items():
        for name, value in changes.items():
            changed = {k for k, v in keys(**{name: value}).items() if v != base[k]}
            assert changed == set(list(base)[list(base).index(stage):]), name
    for harmless in ({"eval_batch": 7}, {"seeds": [5]}, {"sizes": [3]}):
        assert keys(**harmless) == base


def test_what_tells_predictions_apart(store):
    s, names = tiny(store), set()
    original = store.folder

    class Spy(Store):
        def folder(self, kind, config, *args, **options):
            path = original(kind, config, *args, **options)
            names.add(path.name) if kind == "predictions" else None
            return path

    s.store = Spy(store.root)
    numbers(s)
    assert len(names) == 7  # base, MAP on test and validation, MAP of fewer items, three Laplace


def test_an_edited_world_file_makes_a_new_base_model(store, tmp_path, monkeypatch):
    """The facts are edited by hand, and the base model is trained on them."""
    before, known = tiny(store).base_folder, world.load_world()
    facts = json.loads(world.world_file().read_text())
    for concept in facts["concepts"]:  # the likely becomes unlikely
        for relation, weights in concept.get("facts", {}).items():
            concept["facts"][relation] = dict(zip(weights, reversed(weights.values())))
    (tmp_path / "world.json").write_text(json.dumps(facts))
    monkeypatch.setattr(world, "__file__", str(tmp_path / "world.py"))
    monkeypatch.setenv("BMOE_ROOT", str(tmp_path))
    edited = world.load_world()
    assert sum(edited.distribution(*pair) != known.distribution(*pair) for pair in known.pairs) > 100  # or nothing would show
    assert tiny(store).base_folder != before


def test_a_history_does_not_depend_on_who_asked_first(store):
    """The same set is a side curve of one study and the fine-tuning set of another."""
    tiny(store, seeds=[7]).map_history(7, size=12)
    assert [h["epoch"] for h in tiny(store, train_size=12).map_history(7)] == [0, 1, 2]


# ---- the fine-tuning sets -------------------------------------------------------------------------------------------
def test_train_items_are_nested_in_size_and_differ_by_seed(store):
    s = tiny(store)
    ids = lambda seed, size=None: [i["id"] for i in s.train_items(seed, size)]
    assert len(ids(0)) == 24 and ids(0, 8) == ids(0)[:8] and ids(0) == ids(0, 40)[:24] and ids(0) == ids(0)
    assert len(set(ids(0, 1000))) == 60 == len(s.task["train"])
    assert set(ids(0)) != set(ids(1)) and s.train_items(0).readout == "cloze"
    prompts = lambda items: {(i["question"], tuple(sorted(i["choices"]))) for i in items}
    for split in ("validation", "test", "near"):
        assert not prompts(s.train_items(0, 60)) & prompts(s.task[split])
    everything = tiny(store, train_size=None)
    assert len(everything.train_items(0)) == 60


def test_test_size_cuts_what_is_only_evaluated_on(store):
    s = tiny(store)
    assert {k: len(v) for k, v in s.task.items()} == {"train": 60, "validation": 30, "test": 20, "near": 20}
    assert s.shifts == ["near"]


def test_the_temperature_is_fitted_on_validation_alone(store):
    s = tiny(store)
    scaled, temperature = s.temperature_predictions(0)
    validation, test = s.map_predictions(0, "validation"), s.map_predictions(0)
    assert temperature == metrics.fit_temperature(validation.logits, validation.labels)
    assert temperature != metrics.fit_temperature(test.logits, test.labels)
    np.testing.assert_allclose(scaled.probs, torch.tensor(test.logits / temperature).softmax(-1).numpy(), atol=1e-12)
    assert s.temperature_predictions(0, "near")[1] == temperature
    np.testing.assert_array_equal(scaled.labels, test.labels)


def test_val_nll_tuning_sees_validation_alone(store, tmp_path, monkeypatch):
    s, loaded = tiny(Store(tmp_path)), []
    s.store.root.mkdir(exist_ok=True)
    la = tiny(store).laplace(0)
    monkeypatch.setattr(s, "laplace", lambda *_, **__: la)
    monkeypatch.setattr(s, "map_folder", lambda *_, **__: tmp_path / "map")
    monkeypatch.setattr(Study, "tokenizer", tiny(store).tokenizer)
    original = s.loader
    monkeypatch.setattr(s, "loader", lambda items, **options: loaded.append(items) or original(items, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        s.tuned_laplace(0, tune="val_nll", granularity="global")
    assert loaded == [s.task["validation"]]


# ---- other questions, methods and models ----------------------------------------------------------------------------
def test_own_questions_run_through_and_their_test_stays_out_of_training(store, tmp_path, nothing_is_computed, monkeypatch):
    folder, trained_on = yes_no(tmp_path / "own"), []
    original = train.fine_tune
    monkeypatch.setattr(train, "fine_tune", lambda model, loader, **o: trained_on.extend(loader) or original(model, loader, **o))
    s = tiny(store, task=folder, pretrain_steps=2, vocab_size=400, prior_mean="zero")
    assert s.tokenizer_kind == "bpe" and {v.readout for v in s.task.values()} == {"cloze"}
    learned_from = recorded_texts(monkeypatch)
    first = numbers(s)
    for text in learned_from():
        assert "zebra" not in text and "yak" not in text and "Question: is ice cold?\nAnswer:" in text
    assert all(np.isfinite(a).all() for a in first) and first[0].shape == (9, 2)
    assert s.laplace_predictions(0).p_star is None
    assert "Ġzebra" not in s.tokenizer.get_vocab() and "Ġblack" in s.tokenizer.get_vocab()
    texts = [s.tokenizer.decode(row[mask.bool()]) for b in trained_on for row, mask in zip(b["input_ids"], b["attention_mask"])]
    assert len(texts) == 24 + 8 and set(texts) <= {f"Question: {i['question']}\nAnswer:" for i in s.task["train"]}
    nothing_is_computed()
    again = numbers(tiny(store, task=folder, pretrain_steps=2, vocab_size=400, prior_mean="zero"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    (folder / "test.jsonl").write_text((folder / "test.jsonl").read_text().replace("cold", "old"))
    assert tiny(store, task=folder, pretrain_steps=2, vocab_size=400).data_key != s.data_key


def test_the_right_answer_is_not_in_the_text_of_own_questions(tmp_path, monkeypatch):
    """Pretraining on it would show the labels before fine-tuning does."""
    folder, learned_from, seen = yes_no(tmp_path / "own"), recorded_texts(monkeypatch), []
    for store in (Store(tmp_path / "a"), Store(tmp_path / "b")):
        tiny(store, task=folder, vocab_size=400).base()
        seen.append(learned_from())
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        (folder / "train.jsonl").write_text("".join(json.dumps(r | {"answer": 1 - r["answer"]}) + "\n" for r in rows))
    assert seen[0] == seen[1]


def test_own_questions_read_out_by_letters_run_through(store, tmp_path):
    """The letter with its space before it must be a token, though no prompt holds it."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"question": f"what is {t}?", "choices": [f"{t} one", f"{t} two", f"{t} three"], "answer": i % 3}
            for i, t in enumerate("ice fire snow soot lava hail tea ash oak elm fir rye".split())]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    s = tiny(store, task=folder, pretrain_steps=0, vocab_size=400)
    assert s.task["test"].readout == "letters"
    assert s.map_predictions(0).probs.shape == (12, 3)


def test_the_tokenizer_knows_every_word_of_the_world_s_questions(store, small_world):
    """However little text it learned from: an unknown option would share its token with every other."""
    tokenizer = tiny(store).tokenizer
    values = {v for items in small_world.values() for i in items for v in i["choices"]}
    ids = [tokenizer.encode(f" {v}", add_special_tokens=False) for v in values]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(values) > 500
    assert [tokenizer.unk_token_id] not in ids


def test_lora_runs_through(store, nothing_is_computed):
    s = tiny(store, method="lora", prior_mean="zero")
    first = numbers(s)
    assert (s.map_folder(0) / "adapter_model.safetensors").exists() and not (s.map_folder(0) / "model.safetensors").exists()
    assert np.abs(first[1] - first[0]).max() > 1e-3  # the adapter is in use
    base, mapped = s.base()[0].state_dict(), s.map_model(0).get_base_model().state_dict()
    assert all(torch.equal(base[k], mapped[k]) for k in base if k in mapped) and sum(k in mapped for k in base) > 5
    nothing_is_computed()
    assert all(np.array_equal(a, b) for a, b in zip(first, numbers(tiny(store, method="lora", prior_mean="zero")), strict=True))


def test_a_checkpoint_of_one_s_own(store, tmp_path, nothing_is_computed):
    """A folder in place of the embedded model: the same numbers as the model in it, and another key for other weights."""
    embedded = tiny(store)
    model, tokenizer = embedded.base()
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert tiny(store, model=str(folder)).task["test"].readout == "letters"  # as the papers read out large models
    s = tiny(store, model=str(folder), readout="cloze")
    assert not s.embedded and np.array_equal(s.base_predictions().probs, embedded.base_predictions().probs)
    first = numbers(s)
    assert np.array_equal(s.map_predictions(0).probs, embedded.map_predictions(0).probs)
    assert [h["epoch"] for h in s.map_history(0)] == [2]  # a large model is evaluated once
    before = s.map_folder(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "pretrain", None)
        with torch.no_grad():
            model.get_input_embeddings().weight *= 1.1
        model.save_pretrained(folder)
        assert tiny(store, model=str(folder), readout="cloze").map_folder(0) != before
    embedded.base()[0].save_pretrained(folder)
    nothing_is_computed()
    assert all(np.array_equal(a, b) for a, b in zip(first, numbers(tiny(store, model=str(folder), readout="cloze")), strict=True))


def test_an_adapter_s_base_is_in_the_key(store, tmp_path):
    """It is part of the model, though not of the adapter's folder."""
    model, tokenizer = tiny(store).base()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    train.add_lora(loading.load_model(base)[0]).save_pretrained(adapter)
    key = lambda: tiny(store, model=str(adapter))._base_key  # noqa: E731
    first = key()
    assert first == key() == f"{output.fingerprint(adapter)}+{output.fingerprint(base)}"
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1.1
    model.save_pretrained(base)
    assert key() != first and key().startswith(output.fingerprint(adapter))


def test_no_epoch_is_not_all_of_them(store):
    s = tiny(store)
    assert s.map_folder(0, epochs=0) != s.map_folder(0)
