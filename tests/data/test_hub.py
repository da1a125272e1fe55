"""The papers' question sets: read from a cache laid out as the hub's client lays it out, with rows in the hub's schemas."""

import random
import re
import time
from collections import Counter

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, List, Value

import bmoe_utils as bm
from bmoe_utils.data import hub
from bmoe_utils.data.tasks import draw

TEXT = Value("string")
LABELLED = {"text": List(TEXT), "label": List(TEXT)}
SCHEMAS = {  # as the hub's cards give them
    "openbookqa": {"id": TEXT, "question_stem": TEXT, "choices": LABELLED, "answerKey": TEXT},
    "arc_easy": {"id": TEXT, "question": TEXT, "choices": LABELLED, "answerKey": TEXT},
    "commonsenseqa": {"id": TEXT, "question": TEXT, "question_concept": TEXT, "choices": LABELLED, "answerKey": TEXT},
    "winogrande_s": {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
    "boolq": {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
    "sciq": {"question": TEXT, "distractor3": TEXT, "distractor1": TEXT, "distractor2": TEXT, "correct_answer": TEXT, "support": TEXT},
    "medmcqa": {"id": TEXT, "question": TEXT, "opa": TEXT, "opb": TEXT, "opc": TEXT, "opd": TEXT, "cop": ClassLabel(names=list("abcd")),
                "choice_type": TEXT, "exp": TEXT, "subject_name": TEXT, "topic_name": TEXT},
    "mmlu_pro": {"question_id": Value("int64"), "question": TEXT, "options": List(TEXT), "answer": TEXT, "answer_index": Value("int64"),
                 "cot_content": TEXT, "category": TEXT, "src": TEXT},
    "hellaswag": {"ind": Value("int32"), "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "ctx": TEXT, "endings": List(TEXT),
                  "source_id": TEXT, "split": TEXT, "split_type": TEXT, "label": TEXT},
    "piqa": {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": ClassLabel(names=["0", "1"])},
    "siqa": {"context": TEXT, "question": TEXT, "answerA": TEXT, "answerB": TEXT, "answerC": TEXT, "label": TEXT},
    "truthfulqa": {"question": TEXT, **dict.fromkeys(("mc1_targets", "mc2_targets"), {"choices": List(TEXT), "labels": List(Value("int32"))})},
    "mmlu:professional_law": {"question": TEXT, "subject": TEXT, "choices": List(TEXT), "answer": ClassLabel(names=list("ABCD"))},
}  # fmt: skip
SCHEMAS |= {"arc_challenge": SCHEMAS["arc_easy"], "winogrande_m": SCHEMAS["winogrande_s"]}


def row(name, i, split="train"):
    """Row ``i`` of a split; the right option's text is ``right <i>``."""
    question, wrong = f"{split} question {i}?", [f"wrong {i} {x}" for x in "abcd"]
    key = i % 4
    options = wrong[:key] + [f"right {i}"] + wrong[key:3]
    match name:
        case "openbookqa" | "commonsenseqa" | "arc_easy" | "arc_challenge":
            labels = list("1234") if "arc" in name and i % 2 else list("ABCD")
            stem = "question_stem" if name == "openbookqa" else "question"
            more = {"question_concept": "a concept"} if name == "commonsenseqa" else {}
            choices = {"text": options, "label": labels}
            return {"id": f"{split}{i}", stem: question, **more, "choices": choices, "answerKey": labels[key]}
        case "winogrande_s" | "winogrande_m":
            two = [f"right {i}", wrong[0]][:: 1 if i % 2 else -1]
            return {"sentence": question + " _ did.", "option1": two[0], "option2": two[1], "answer": "1" if i % 2 else "2"}
        case "boolq":
            return {"question": question, "answer": i % 3 == 0, "passage": f"Passage {i}."}
        case "sciq":
            return {"question": question, "distractor3": wrong[2], "distractor1": wrong[0], "distractor2": wrong[1],
                    "correct_answer": f"right {i}", "support": f"It is right {i}."}
        case "medmcqa":
            return {"id": f"{split}{i}", "question": question, **dict(zip(("opa", "opb", "opc", "opd"), options)), "cop": key,
                    "exp": "why", "choice_type": "single", "subject_name": "Surgery" if i % 5 == 4 else "Medicine", "topic_name": None}
        case "mmlu_pro":  # 3 to 10 options
            return {"question_id": i, "question": question, "options": options + [f"more {k}" for k in range(i % 7)], "answer": "ABCD"[key],
                    "answer_index": key, "cot_content": "", "category": "law", "src": "x"}
        case "hellaswag":
            return {"ind": i, "activity_label": "Law", "ctx_a": question, "ctx_b": "", "ctx": question, "endings": options,
                    "source_id": "a~b", "split": split, "split_type": "indomain", "label": str(key)}
        case "piqa":
            return {"goal": question, **dict(zip(("sol1", "sol2"), [f"right {i}", wrong[0]][:: -1 if i % 2 else 1])), "label": i % 2}
        case "siqa":
            three = wrong[: i % 3] + [f"right {i}"] + wrong[i % 3 : 2]
            return {"context": f"Passage {i}.", "question": question, **dict(zip(("answerA", "answerB", "answerC"), three)), "label": str(i % 3 + 1)}
        case "truthfulqa":
            mc1 = {"choices": [f"right {i}", *wrong[:3]], "labels": [1, 0, 0, 0]}
            return {"question": question, "mc1_targets": mc1, "mc2_targets": mc1 | {"labels": [1, 1, 0, 0]}}
    return {"question": question, "subject": name.partition(":")[2], "choices": options, "answer": key}


def unlabelled(name, i):
    hidden = {"winogrande_s": {"answer": ""}, "commonsenseqa": {"answerKey": ""}, "medmcqa": {"cop": -1},
              "hellaswag": {"label": ""}, "piqa": {"label": -1}}
    return row(name, i, "test") | hidden[name.replace("_m", "_s")]


def write(path, name, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=Features(SCHEMAS[name])).to_parquet(path)


def snapshot(cache, name):
    """Where `hf download` puts the files of a task's repository."""
    task = hub.hub_task(name)
    return cache / f"datasets--{task.repo.replace('/', '--')}" / "snapshots" / task.revision / task.folder


SIZES = {"train": 60, "validation": 12, "test": 9, "dev": 5}


def put(folder, name, **splits):
    """A task's files. The hub's own test split is there, too, where the task must not touch it."""
    task = hub.hub_task(name)
    for split in task.splits.values():
        rows = splits.get(split) or [row(name, i, split) for i in range(SIZES[split])]
        write(folder / task.name.format(split=split), name, rows)
    if "test" not in task.splits.values() and name not in ("boolq", "siqa", "truthfulqa"):
        write(folder / task.name.format(split="test"), name, [unlabelled(name, i) for i in range(6)])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; whoever asks the network gets an error."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return tmp_path / "hub"


# ---- rows -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_gives_the_right_answers(name, cache):
    put(snapshot(cache, name), name)
    task = bm.load_task(name)
    for split, items in task.items():
        assert items and items.readout == ("cloze" if name == "boolq" else "letters")
        for item in items:
            asked = re.match(r"(\w+) question (\d+)\?", item["question"])
            i = int(asked[2])
            right = ["no", "yes"][i % 3 == 0] if name == "boolq" else f"right {i}"
            assert item["choices"][item["answer"]] == right
            more = {"boolq": 2, "winogrande_s": 2, "winogrande_m": 2, "piqa": 2, "siqa": 3, "mmlu_pro": 4 + i % 7}
            assert len(item["choices"]) == more.get(name, 4)
            assert item.get("passage") == (f"Passage {i}." if name in ("boolq", "siqa") else None)
            source = hub.hub_task(name).splits.get(split, "train")  # validation cut off train where the table has none
            assert asked[1] == source


def test_ids_are_the_hub_s_or_say_task_split_and_row(cache):
    put(snapshot(cache, "openbookqa"), "openbookqa")
    put(snapshot(cache, "mmlu:professional_law"), "mmlu:professional_law")
    assert bm.load_task("openbookqa")["test"][3]["id"] == "test3"
    assert bm.load_task("mmlu:professional_law")["dev"][0]["id"] == "mmlu:professional_law-dev-00001"


def test_sciq_s_right_option_stands_anywhere_and_always_in_the_same_place(cache):
    rows = [row("sciq", i) for i in range(400)]
    put(snapshot(cache, "sciq"), "sciq", train=rows)
    task = bm.load_task("sciq", seed=1)
    counts = Counter(item["answer"] for item in task["train"])
    assert all(65 < counts[place] < 135 for place in range(4)), counts  # 100 +- 4 standard deviations (8.7)
    where = {item["question"]: item["choices"] for item in task["train"]}
    assert len({tuple(re.sub(r"\d+", "", c) for c in choices) for choices in where.values()}) == 24  # every order occurs
    put(snapshot(cache, "sciq"), "sciq", train=rows[::-1])
    assert {item["question"]: item["choices"] for item in bm.load_task("sciq")["train"]} == where
    assert "support" not in task["train"][0] and "passage" not in task["train"][0]


def test_medmcqa_is_medicine_alone(cache):
    put(snapshot(cache, "medmcqa"), "medmcqa")
    task = bm.load_task("medmcqa")
    assert len(task["train"]) + len(task["validation"]) == 48 and len(task["test"]) == 10  # of 60 and 12, every fifth is surgery


def test_rows_that_are_no_questions_are_left_out_and_named(cache):
    rows = [row("medmcqa", i) for i in range(20)]
    rows[0] |= {"opb": None}
    rows[1] |= {"opa": rows[1]["opb"]}
    put(snapshot(cache, "medmcqa"), "medmcqa", train=rows)
    with pytest.warns(UserWarning, match="medmcqa: 2 rows left out, being no questions"):
        task = bm.load_task("medmcqa")
    twice = "the right option 'right 1' is there twice"
    assert task["train"].origin["left_out"] == {"train0": "option None is not text", "train1": twice}
    assert len(task["train"]) + len(task["validation"]) == 14 and task["test"].origin["left_out"] == {}


# ---- splits ---------------------------------------------------------------------------------------------------------
def test_the_table_in_the_docstring_is_the_code_s():
    lines = [line for line in hub.__doc__.splitlines() if re.match(r"[a-z_]+(:<subject>)? +[\w-]+/", line)]
    shown = {line.split()[0]: line for line in lines}
    assert set(shown) == set(hub.NAMES)
    for name, line in shown.items():
        task = hub.hub_task(name.replace("<subject>", "virology"))
        _, where, train, validation, test = re.split(r" {2,}", line)
        repo, _, folder = where.partition(", ")
        assert repo == task.repo and folder == {"data": "", "virology": "<subject>"}.get(task.folder, task.folder)
        assert train.split()[0].rstrip(",") == task.splits.get("train", "none") and test.split()[0] == task.splits["test"]
        other = "a tenth of train" if "train" in task.splits else "none"
        assert validation.split(" (")[0] == task.splits.get("validation", other)


@pytest.mark.parametrize("name", [n for n in SCHEMAS if "train" in hub.hub_task(n).splits])
def test_training_shares_no_question_with_validation_or_test(name, cache):
    put(snapshot(cache, name), name)
    task = bm.load_task(name)
    assert list(task) == ["train", "validation", "test"]
    asked = [{i["question"] for i in split} for split in task.values()]
    assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]
    if "validation" in hub.TASKS[name].splits:
        assert [len(s) for s in task.values()] == [60, 12, 9]
        assert [i["question"] for i in task["train"]] == [f"train question {i}?" for i in range(60)]
        assert bm.load_task(name, seed=1) == task
    else:
        n = 48 if name == "medmcqa" else 60
        assert [len(s) for s in task.values()] == [n - round(n / 10), round(n / 10), 10 if name == "medmcqa" else 12]
        other = bm.load_task(name, seed=1)
        assert bm.load_task(name) == task and other["test"] == task["test"] and other["validation"] != task["validation"]
        assert (task["train"].origin["seed"], other["validation"].origin["seed"], task["test"].origin["seed"]) == (0, 1, None)


@pytest.mark.parametrize("name", ["openbookqa", "commonsenseqa"])
def test_training_rows_that_are_also_held_out_are_left_out_and_named(name, cache):
    held = "validation"
    rows = [row(name, i) for i in range(40)]
    twin = row(name, 3) | {"id": "a twin"}  # the same question with its options in another order
    twin["choices"] = {"text": twin["choices"]["text"][::-1], "label": list("ABCD")}
    put(snapshot(cache, name), name, train=rows, validation=[row(name, 7), twin, row(name, 0, "validation")])
    task = bm.load_task(name)
    said = f"also in {'test' if name == 'commonsenseqa' else held}"
    assert task["train"].origin["left_out"] == {"train3": said, "train7": said}
    left = [*task["train"], *(task["validation"] if name == "commonsenseqa" else [])]
    assert {i["id"] for i in left} == {f"train{i}" for i in range(40)} - {"train3", "train7"}
    assert len(task["test" if name == "commonsenseqa" else held]) == 3


def test_mmlu_has_no_training_split_and_says_so(cache):
    put(snapshot(cache, "mmlu:professional_law"), "mmlu:professional_law")
    task = bm.load_task("mmlu:professional_law")
    assert {k: len(v) for k, v in task.items()} == {"validation": 12, "test": 9, "dev": 5}
    with pytest.raises(KeyError, match="mmlu:professional_law has no split 'train'; it has: validation, test, dev"):
        task["train"]
    with pytest.raises(ValueError, match="MMLU has no subject 'law'; there are: abstract_algebra, .*professional_law"):
        bm.load_task("mmlu:law")
    assert len(set(hub.MMLU_SUBJECTS)) == 57


def test_origin_travels_with_samples_and_is_json(cache):
    put(snapshot(cache, "openbookqa"), "openbookqa")
    task = bm.load_task("openbookqa")
    assert task["train"].origin == {
        "task": "openbookqa", "split": "train", "source": "allenai/openbookqa", "configuration": "main", "hub_split": "train",
        "revision": hub.TASKS["openbookqa"].revision, "seed": None, "left_out": {}}
    assert draw(task["train"], 0, 5).origin == task["train"].origin == task["train"].subset(3).origin
    world = bm.load_task("world")
    assert world["near"].origin["split"] == "near" and re.fullmatch("[0-9a-f]{64}", world["near"].origin["revision"])


# ---- where the files come from --------------------------------------------------------------------------------------
def test_files_that_are_damaged_or_another_set_s_are_named(cache, tmp_path):
    put(tmp_path / "mine", "hellaswag")
    (tmp_path / "mine" / "validation-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="mine/validation-00000-of-00001.parquet cannot be read as parquet: ") as error:
        bm.load_task("hellaswag", source=tmp_path / "mine")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="train.*no question of piqa among 60 rows, the first: no field 'choices'"):
        for split in ("train", "validation"):
            (tmp_path / "other" / split).mkdir(parents=True)
            rows = datasets.Dataset.from_list([{"question": "q?", "text": "t"}] * 60)
            rows.to_parquet(tmp_path / "other" / split / "0000.parquet")
        bm.load_task("piqa", source=tmp_path / "other")
    with pytest.raises(ValueError, match="has no column 'subject_name', as openlifescienceai/medmcqa has: question, text"):
        (tmp_path / "third").mkdir()
        for split in ("train", "validation"):
            rows.to_parquet(tmp_path / "third" / f"{split}.parquet")
        bm.load_task("medmcqa", source=tmp_path / "third")


def test_files_that_the_hub_converted_lie_in_a_folder_a_split(cache, tmp_path):
    """The repository of such a set is a script; the hub's client puts its converted files in the cache as they are named there."""
    assert hub.TASKS["piqa"].file("test") == "plain_text/validation/0000.parquet"
    for place in (tmp_path / "mine", snapshot(cache, "piqa")):
        put(place, "piqa")
    task = bm.load_task("piqa", source=tmp_path / "mine")
    assert list(task["test"]) == list(bm.load_task("piqa")["test"]) and len(task["test"]) == 12


@pytest.mark.parametrize("place", ["", "main"])
def test_a_folder_of_downloaded_files(place, cache, tmp_path):
    put(tmp_path / "mine" / place, "openbookqa")
    task = bm.load_task("openbookqa", source=tmp_path / "mine")
    assert {k: len(v) for k, v in task.items()} == {"train": 60, "validation": 12, "test": 9}
    revision = task["test"].origin["revision"]
    assert re.fullmatch("[0-9a-f]{64}", revision) and revision != hub.TASKS["openbookqa"].revision
    put(tmp_path / "mine" / place, "openbookqa", test=[row("openbookqa", i, "test") for i in range(8)])
    again = bm.load_task("openbookqa", source=tmp_path / "mine")
    assert again["test"].origin["revision"] != revision and again["train"].origin == task["train"].origin


def test_a_folder_that_lacks_a_split_and_a_task_that_has_no_source(cache, tmp_path):
    write(tmp_path / "train.parquet", "openbookqa", [row("openbookqa", 0)])
    with pytest.raises(FileNotFoundError, match="has no validation.parquet and no test.parquet of allenai/openbookqa"):
        bm.load_task("openbookqa", source=tmp_path)
    with pytest.raises(ValueError, match="source is for the hub's question sets .*not for 'world'"):
        bm.load_task("world", source=tmp_path)


def test_files_in_the_cache_are_used_without_asking_the_hub(cache, monkeypatch):
    def ask(*_, **__):
        raise AssertionError("asked the hub")

    put(snapshot(cache, "boolq"), "boolq")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    assert len(bm.load_task("boolq")["test"]) == 12


@pytest.mark.parametrize("offline", ["by request", "no network"])
def test_without_network_and_cache_one_line_says_what_to_do(offline, cache, monkeypatch):
    if offline == "no network":
        def unreachable(*_, **__):
            raise ConnectionError("Name or service not known")

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("tried for half a minute"))
    put(snapshot(cache, "winogrande_m"), "winogrande_m")
    (snapshot(cache, "winogrande_m") / "train-00000-of-00001.parquet").unlink()
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        bm.load_task("winogrande_m")
    assert time.perf_counter() - start < 5  # huggingface_hub's retries alone take 23 s
    said, revision = str(error.value), hub.TASKS["winogrande_m"].revision
    assert "\n" not in said and said.startswith("winogrande_m/train-00000-of-00001.parquet of the dataset allenai/winogrande")
    assert f"hf download --repo-type dataset allenai/winogrande --revision {revision} --include 'winogrande_m/*'" in said
    assert "validation" not in said  # which is there


def test_missing_files_alone_are_downloaded_at_the_fixed_commit(cache, tmp_path, monkeypatch):
    put(tmp_path / "elsewhere", "arc_easy")
    put(snapshot(cache, "arc_easy"), "arc_easy")
    (snapshot(cache, "arc_easy") / "test-00000-of-00001.parquet").unlink()
    asked = []

    def download(repo, file, **where):
        asked.append((repo, file, where))
        return str(tmp_path / "elsewhere" / file.rpartition("/")[2])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(bm.load_task("arc_easy")["test"]) == 9
    revision = hub.TASKS["arc_easy"].revision
    assert asked == [("allenai/ai2_arc", "ARC-Easy/test-00000-of-00001.parquet", {"repo_type": "dataset", "revision": revision})]


# ---- real rows ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["openbookqa", "arc_easy", "arc_challenge", "boolq"])
def test_real_rows_through_the_hub_s_loader(name, real_data, cache):
    """The files at hand are train and test; a multiple-choice set's validation is stood in for by some training rows."""
    train, test = (pq.read_table(real_data / name / f"{split}.parquet") for split in ("train", "test"))
    folder, official = snapshot(cache, name), "validation" in hub.TASKS[name].splits
    folder.mkdir(parents=True)
    chosen = random.Random(0).sample(range(len(train)), 30)
    parts = {"train": train, "validation": train.take(chosen), "test": test} if official else {"train": train, "validation": test}
    for split, table in parts.items():
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    task = bm.load_task(name)
    sizes = re.search(rf"^{name} .*train \((\d+)\).* (?:test|validation) \((\d+)\)$", hub.__doc__.replace("), cut", ")"), re.M)
    assert len(task["test"]) == int(sizes[2]) == len(test) and int(sizes[1]) == len(train)
    left_out = task["train"].origin["left_out"]
    if official:
        assert len(task["validation"]) == 30 and len(task["train"]) == len(train) - len(left_out)
        leaked = {"openbookqa": 14, "arc_easy": 3, "arc_challenge": 0}[name]  # questions; their options in any order
        asked = lambda items: {(i["question"], *sorted(i["choices"])) for i in items}
        assert not asked(task["train"]) & (asked(task["validation"]) | asked(task["test"]))
        own = asked(bm.load_task(real_data / name)["train"]) | asked(bm.load_task(real_data / name)["validation"])
        assert len(own & asked(task["test"])) == leaked
        if name == "arc_easy":  # whose training rows are all different
            assert sorted(Counter(left_out.values()).items()) == [("also in test", 3), ("also in validation", 30)]
    else:
        assert not left_out and len(task["validation"]) == 943 and len(task["train"]) == 8484
        answers = dict(zip(test["question"].to_pylist(), test["answer"].to_pylist()))
        assert all(item["answer"] == int(answers[item["question"]]) for item in task["test"])
