"""Question files in the layouts found in the wild, and the batches made of them, against values written out here."""

import csv
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bmoe_utils as bm
from bmoe_utils.data.tasks import MalformedQuestions, Split, length_batches, read_questions
from bmoe_utils.models.embedded import train_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` keeps of each file goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def csv_file(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def hub(question, texts, labels, key, name="question"):
    return {"id": f"q{key}", name: question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def plain(question, answer, choices=("red", "blue", "green"), **more):
    return {"question": question, "choices": list(choices), "answer": answer, **more}


def own_task(folder, n=40, write=jsonl, suffix=".jsonl", **splits):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": [plain(f"train question {i}?", i % 3) for i in range(n)],
              "test": [plain(f"test question {i}?", i % 3) for i in range(7)], **splits}
    for name, rows in splits.items():
        if rows is not None:
            write(folder / f"{name}{suffix}", rows)
    return folder


# ---- layouts --------------------------------------------------------------------------------------------------------
def test_hub_layouts_in_parquet(tmp_path):
    parquet(tmp_path / "openbookqa.parquet", [
        hub("The sun is ", ["a rock", " a star ", "a moon", "a lamp"], list("ABCD"), "B", "question_stem")])
    assert read_questions(tmp_path / "openbookqa.parquet") == [
        {"id": "qB", "question": "The sun is", "choices": ["a rock", "a star", "a moon", "a lamp"], "answer": 1}]

    parquet(tmp_path / "arc.parquet", [
        hub("three?", ["x", "y", "z"], list("ABC"), "C"),
        hub("five?", list("vwxyz"), list("ABCDE"), "E"),
        hub("digits?", ["1", "2", "3", "4"], list("4321"), "1"),  # the key is a label, not the option's text or index
        hub("digits too?", ["w", "x", "y", "z"], list("1234"), "4"),
        hub("numbers?", ["4", "3", "2", "1"], list("ABCD"), "A"),
    ])
    items = read_questions(tmp_path / "arc.parquet")
    assert [i["answer"] for i in items] == [2, 4, 3, 3, 0]
    assert [len(i["choices"]) for i in items] == [3, 5, 4, 4, 4]

    parquet(tmp_path / "boolq.parquet", [{"question": "is ice cold", "answer": True}, {"question": "is fire cold", "answer": False}])
    items = read_questions(tmp_path / "boolq.parquet")
    assert items[0] == {"id": "boolq-00001", "question": "is ice cold", "choices": ["no", "yes"], "answer": 1}
    assert items[1]["answer"] == 0


@pytest.mark.parametrize("write, suffix", [(jsonl, ".jsonl"), (csv_file, ".csv"), (parquet, ".parquet"),
                                           (lambda p, rows: p.write_text(json.dumps(rows, indent=1)), ".json")])
@pytest.mark.parametrize("answers", [[2, 0, 1], ["C", "A", "B"], ["größer", "rot", "北京"], ["2", "0", "1"]])
def test_answers_by_index_letter_and_text_in_every_format(write, suffix, answers, tmp_path):
    choices = ["rot", "北京", "größer"]
    if write is csv_file:
        rows = [plain(f"wie, \"{i}\"?", a, []) | {"choices": json.dumps(choices)} for i, a in enumerate(answers)]
    else:
        rows = [plain(f"wie, \"{i}\"?", a, choices) for i, a in enumerate(answers)]
    write(tmp_path / f"some{suffix}", rows)
    items = read_questions(tmp_path / f"some{suffix}")
    first = 2 if write is csv_file else 1  # the header is a CSV file's first line
    assert items == [{"id": f"some-0000{i + first}", "question": f"wie, \"{i}\"?", "choices": choices, "answer": a}
                     for i, a in enumerate([2, 0, 1])]


def test_an_option_s_own_text_wins_over_its_reading_as_an_index(tmp_path):
    jsonl(tmp_path / "some.jsonl", [plain("how many?", "1", ["2", "1", "0"]), plain("how many?", 0, ["2", "1", "0"])])
    assert [i["answer"] for i in read_questions(tmp_path / "some.jsonl")] == [1, 0]


def test_an_id_of_zero_is_kept(tmp_path):
    jsonl(tmp_path / "some.jsonl", [plain("first?", 0, id=0), plain("second?", 1, id=1)])
    assert [i["id"] for i in read_questions(tmp_path / "some.jsonl")] == ["0", "1"]


def test_csv_answers_true_and_false_in_lower_case(tmp_path):
    """The csv reader turns the column into booleans, and their text is then "True"."""
    rows = [plain("is ice cold?", "true", []), plain("is fire cold?", "false", [])]
    csv_file(tmp_path / "some.csv", [r | {"choices": '["false", "true"]'} for r in rows])
    assert [i["answer"] for i in read_questions(tmp_path / "some.csv")] == [1, 0]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"], ids=["2028", "0085"])
def test_jsonl_rows_end_at_newlines_only(separator, tmp_path):
    """str.splitlines also cuts at characters that JSON allows inside a string."""
    jsonl(tmp_path / "some.jsonl", [plain(f"two {separator} lines?", 1)])
    assert read_questions(tmp_path / "some.jsonl")[0]["question"] == f"two {separator} lines?"


def test_a_wrong_option_given_twice_is_kept_for_letters(tmp_path):
    """Three training questions of OpenBookQA are like that; letters tell the two apart."""
    rows = [hub("what holds a tree up?", ["sky", "roots", "sky", "leaves"], list("ABCD"), "B", "question_stem")]
    own_task(tmp_path / "own", train=rows + [plain(f"q{i}?", 0) for i in range(12)], test=rows)
    assert bm.load_task(tmp_path / "own", readout="letters")["test"][0]["choices"] == ["sky", "roots", "sky", "leaves"]


def test_a_changed_file_is_read_anew(tmp_path):
    for question in ("before?", "after?"):
        parquet(tmp_path / "some.parquet", [plain(question, 0)])
        assert read_questions(tmp_path / "some.parquet")[0]["question"] == question


# ---- faults ---------------------------------------------------------------------------------------------------------
MALFORMED = {
    "the question is empty": {"question": "  ", "choices": ["a", "b"], "answer": 0},
    "no field 'answer'": {"question": "q?", "choices": ["a", "b"]},
    "choices must be a list of 2 to 26": {"question": "q?", "choices": ["a"], "answer": 0},
    "an option is empty": {"question": "q?", "choices": ["a", " "], "answer": 0},
    "answer 'C' is no index, letter or text": {"question": "q?", "choices": ["a", "b"], "answer": "C"},
    "answer 2 is not among the 2": {"question": "q?", "choices": ["a", "b"], "answer": 2},
    "answer -1 is not among the 2": {"question": "q?", "choices": ["a", "b"], "answer": -1},
    "answer None is no index": {"question": "q?", "choices": ["a", "b"], "answer": None},
    "answer True is no index": {"question": "q?", "choices": ["a", "b"], "answer": True},
}


def test_every_malformed_row_is_named_with_file_row_and_reason(tmp_path):
    good = plain("fine?", 0)
    jsonl(tmp_path / "some.jsonl", [row for bad in MALFORMED.values() for row in (good, bad)])
    with (tmp_path / "some.jsonl").open("a") as file:
        file.write('{"question": "cut sho\n')
    with pytest.raises(ValueError) as error:
        read_questions(tmp_path / "some.jsonl")
    first, *lines = str(error.value).splitlines()
    assert first == f"{tmp_path / 'some.jsonl'}: {len(MALFORMED) + 1} malformed of {2 * len(MALFORMED) + 1} questions"
    assert len(lines) == len(MALFORMED) + 1
    said = {line.split(":")[0].strip(): line for line in lines}
    for number, reason in enumerate(MALFORMED, 1):
        assert reason in said[f"line {2 * number}"]
    assert "not JSON" in said[f"line {2 * len(MALFORMED) + 1}"]


def test_malformed_parquet_and_many_rows(tmp_path):
    """The message stops somewhere; the exception itself has every row."""
    rows = [plain(f"q{i}?", 9 if i % 2 else 0) for i in range(230)]
    parquet(tmp_path / "some.parquet", rows)
    with pytest.raises(MalformedQuestions, match=r"some\.parquet: 115 malformed of 230") as error:
        read_questions(tmp_path / "some.parquet")
    assert str(error.value).count("\n  row ") == 100 and str(error.value).endswith("and 15 more")
    assert "row 2: answer 9" in str(error.value) and "row 3:" not in str(error.value)
    assert [number for number, _ in error.value.faults] == list(range(2, 231, 2))


@pytest.mark.parametrize("text", ["42", '"word"', "[1, 2]", "null"])
def test_a_row_that_is_no_object_is_named_too(text, tmp_path):
    (tmp_path / "some.jsonl").write_text(json.dumps(plain("fine?", 0)) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"some\.jsonl: 1 malformed of 2 questions\n  line 2"):
        read_questions(tmp_path / "some.jsonl")


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "some.json").write_text('[{"question": "q?", ')
    with pytest.raises(ValueError, match=r"some\.json"):
        read_questions(tmp_path / "some.json")


def test_files_that_are_missing_or_empty(tmp_path):
    with pytest.raises(ValueError, match="no_such_task.*neither 'world' nor a set of the hub .*openbookqa.* nor a file or folder"):
        bm.load_task("no_such_task")
    own_task(tmp_path / "a", test=None)
    with pytest.raises(ValueError, match="has no test file"):
        bm.load_task(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="has no test and no train file"):
        bm.load_task(tmp_path / "b")
    own_task(tmp_path / "c", test=[])
    with pytest.raises(ValueError, match="test.jsonl holds no question"):
        bm.load_task(tmp_path / "c")


# ---- splits ---------------------------------------------------------------------------------------------------------
def test_validation_is_a_seeded_tenth_of_train(tmp_path):
    folder = own_task(tmp_path / "own")
    a, b, c = bm.load_task(folder), bm.load_task(str(folder)), bm.load_task(folder, seed=1)
    assert a == b and a["validation"] != c["validation"]
    for task in (a, c):
        assert list(task) == ["train", "validation", "test"]
        train, validation, test = ({i["question"] for i in split} for split in task.values())
        assert len(train) == len(task["train"]) == 36 and len(validation) == len(task["validation"]) == 4
        assert train | validation == {f"train question {i}?" for i in range(40)}
        assert test == {f"test question {i}?" for i in range(7)}


def test_a_validation_file_is_used_as_it_is(tmp_path):
    folder = own_task(tmp_path / "own", validation=[plain("held out?", 2)])
    task = bm.load_task(folder)
    assert [i["question"] for i in task["validation"]] == ["held out?"]
    assert [i["question"] for i in task["train"]] == [f"train question {i}?" for i in range(40)]


def test_a_question_asked_twice_in_train_is_not_cut_apart(tmp_path):
    """The same question on both sides of the cut would let validation reward memorising."""
    rows = [plain(f"question {i // 2}?", 0) for i in range(60)]
    task = bm.load_task(own_task(tmp_path / "own", train=rows))
    assert not {i["question"] for i in task["train"]} & {i["question"] for i in task["validation"]}


@pytest.mark.parametrize("choices, readout", [
    (["no", "yes"], "cloze"), (["true", "false"], "cloze"), (["a rock", "a star"], "letters"), (["7", "8"], "letters")])
def test_default_readout(choices, readout, tmp_path):
    rows = [plain(f"q{i}?", 0, choices) for i in range(12)]
    task = bm.load_task(own_task(tmp_path / "own", train=rows))
    assert {split.readout for split in task.values()} == {readout}
    other = {"cloze": "letters", "letters": "cloze"}[readout]
    assert bm.load_task(tmp_path / "own", readout=other)["test"].readout == other


def test_many_different_option_words_are_read_out_by_letters(tmp_path):
    rows = [plain(f"q{i}?", 0, ["abcdefghijkl"[i], "zzz"]) for i in range(12)]
    assert bm.load_task(own_task(tmp_path / "own", train=rows))["test"].readout == "letters"


def test_the_world_by_name_and_subsets():
    task = bm.load_task("world")
    assert {"train", "validation", "test", "near", "far"} <= set(task) and task["test"].readout == "cloze"
    few = task["test"].subset(20)
    assert list(few) == task["test"][:20] and few.readout == "cloze"
    assert len(few.subset(None)) == 20 and len(few.subset(99)) == 20
    assert bm.load_task("world") == task and bm.load_task("world", seed=1)["train"] != task["train"]


# ---- batches --------------------------------------------------------------------------------------------------------
ITEMS = [
    {"id": "a", "question": "what is red?", "choices": ["blood", "snow", "soot"], "answer": 0},
    {"id": "b", "question": "what is very cold in winter?", "choices": ["fire", "snow", "soup", "noon", "soot"], "answer": 1},
    {"id": "c", "question": "what is soot?", "choices": ["black", "red"]},
]
LETTER_PROMPTS = [
    "Question: what is red?\nA. blood\nB. snow\nC. soot\nAnswer:",
    "Question: what is very cold in winter?\nA. fire\nB. snow\nC. soup\nD. noon\nE. soot\nAnswer:",
    "Question: what is soot?\nA. black\nB. red\nAnswer:",
]
CLOZE_PROMPTS = ["Question: what is red?\nAnswer:", "Question: what is very cold in winter?\nAnswer:", "Question: what is soot?\nAnswer:"]
OPTIONS = {"letters": [list("ABC"), list("ABCDE"), list("AB")], "cloze": [i["choices"] for i in ITEMS]}


def tokenizer_for_items(kind="word"):
    return train_tokenizer(LETTER_PROMPTS + [f" {w}" for row in sum(OPTIONS.values(), []) for w in row] * 30, 600, kind)


@pytest.mark.parametrize("kind", ["word", "bpe"])
@pytest.mark.parametrize("readout", ["letters", "cloze"])
def test_a_batch_s_exact_contents(readout, kind):
    tokenizer = tokenizer_for_items(kind)
    prompts = LETTER_PROMPTS if readout == "letters" else CLOZE_PROMPTS
    (batch,) = bm.make_loader(Split(ITEMS, readout), tokenizer, batch_size=3)
    assert set(batch) == {"input_ids", "attention_mask", "option_ids", "labels"}
    rows = [tokenizer.encode(p) for p in prompts]
    T = max(map(len, rows))
    assert batch["input_ids"].tolist() == [[tokenizer.pad_token_id] * (T - len(r)) + r for r in rows]
    assert batch["attention_mask"].tolist() == [[0] * (T - len(r)) + [1] * len(r) for r in rows]
    expected = [[tokenizer.encode(f" {w}")[0] for w in words] for words in OPTIONS[readout]]
    assert batch["option_ids"].tolist() == [ids + [-1] * (5 - len(ids)) for ids in expected]
    assert batch["labels"].tolist() == [0, 1, -1]
    assert batch["input_ids"].dtype == batch["option_ids"].dtype == batch["labels"].dtype == torch.int64
    # the option's token is the one that follows the prompt in running text
    for prompt, words, ids in zip(prompts, OPTIONS[readout], expected, strict=True):
        assert tokenizer.encode(f"{prompt} {words[0]}") == tokenizer.encode(prompt) + ids[:1]


def test_p_star_is_in_the_batch_where_every_item_has_it():
    tokenizer, p = tokenizer_for_items(), [[0.7, 0.2, 0.1], [0.0, 0.5, 0.25, 0.125, 0.125], [1.0, 0.0]]
    known = Split([i | {"p_star": q} for i, q in zip(ITEMS, p, strict=True)], "cloze")
    (batch,) = bm.make_loader(known, tokenizer)
    assert batch["p_star"].dtype == torch.float64
    assert batch["p_star"].tolist() == [q + [0.0] * (5 - len(q)) for q in p]
    (batch,) = bm.make_loader(Split([*known[:2], ITEMS[2]], "cloze"), tokenizer)
    assert "p_star" not in batch


def test_the_given_readout_wins_and_a_plain_list_is_read_by_letters():
    tokenizer = tokenizer_for_items()
    first = lambda items, **options: next(iter(bm.make_loader(items, tokenizer, **options)))["option_ids"][0, 0].item()
    a, blood = tokenizer.encode(" A")[0], tokenizer.encode(" blood")[0]
    assert first(ITEMS) == a and first(Split(ITEMS, "cloze")) == blood
    assert first(Split(ITEMS, "cloze"), readout="letters") == a and first(ITEMS, readout="cloze") == blood
    with pytest.raises(ValueError, match="'word' is not 'letters' or 'cloze'"):
        bm.make_loader(ITEMS, tokenizer, readout="word")


def test_an_option_of_several_tokens_is_refused():
    small = train_tokenizer(LETTER_PROMPTS, 258)  # bytes alone
    with pytest.raises(ValueError, match="' A' is 2 tokens"):
        bm.make_loader(ITEMS, small)
    with pytest.raises(ValueError, match="' snow storm' is 2 tokens"):
        bm.make_loader([ITEMS[0] | {"choices": ["snow", "snow storm"]}],
                       train_tokenizer(["a snow storm"], 90, "word"), readout="cloze")


def test_options_that_share_a_token_are_refused():
    with pytest.raises(ValueError, match="'a'.*share a token"):
        bm.make_loader([ITEMS[0] | {"choices": ["snow", "soot", "snow"]}], tokenizer_for_items(), readout="cloze")


def test_an_option_the_tokenizer_does_not_know_is_refused():
    """A word tokenizer gives its one token for the unknown, the same for every such option of every item."""
    with pytest.raises(ValueError, match="granite"):
        bm.make_loader([ITEMS[0] | {"choices": ["snow", "granite"]}], tokenizer_for_items(), readout="cloze")


def test_long_questions_are_refused_not_cut():
    tokenizer = tokenizer_for_items()
    length = len(tokenizer.encode(LETTER_PROMPTS[1]))
    (batch,) = bm.make_loader(ITEMS, tokenizer, max_length=length)
    assert batch["input_ids"].shape == (3, length)
    with pytest.raises(ValueError, match=f"'b' is {length} tokens long.*max_length={length - 1}"):
        bm.make_loader(ITEMS, tokenizer, max_length=length - 1)


def test_shuffling_is_seeded_and_loses_nothing():
    tokenizer = tokenizer_for_items()
    items = [ITEMS[0] | {"id": str(i), "answer": i} for i in range(50)]  # the label as a tag
    order = lambda loader: torch.cat([b["labels"] for b in loader]).tolist()
    make = lambda **options: bm.make_loader(items, tokenizer, batch_size=8, **options)
    assert order(make()) == list(range(50)) == order(make(seed=3))
    one, two, other = make(shuffle=True, seed=3), make(shuffle=True, seed=3), make(shuffle=True, seed=4)
    epochs = [order(one), order(one)]
    random.seed(1)
    torch.manual_seed(1)  # the order is the loader's own affair
    assert epochs == [order(two), order(two)]
    assert epochs[0] != epochs[1] and epochs[0] != order(other)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)


# ---- batches of similar length --------------------------------------------------------------------------------------
def test_length_batches_cover_every_index_once_an_epoch():
    lengths = [random.randint(1, 30) for _ in range(103)]
    batches = length_batches(lengths, 8, seed=2)
    epochs = [[next(batches) for _ in range(13)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(103))
        assert sorted(len(b) for b in epoch) == [7] + [8] * 12
        spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in epoch)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))  # no two batches overlap in length
        assert [b[0] for b in epoch] != sorted((b[0] for b in epoch), key=lambda i: lengths[i])  # not from short to long
    assert epochs[0] != epochs[1]
    again, other = length_batches(lengths, 8, seed=2), length_batches(lengths, 8, seed=3)
    assert [next(again) for _ in range(26)] == sum(epochs, [])
    assert [next(other) for _ in range(13)] != epochs[0]


# ---- the real files -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, train, test", [("openbookqa", 4957, 500), ("arc_easy", 2251, 2376), ("arc_challenge", 1119, 1172)])
def test_real_multiple_choice_sets(real_data, name, train, test):
    """Every row in the file is an item, whose answer is the one the file says."""
    task = bm.load_task(real_data / name)
    assert len(task["train"]) + len(task["validation"]) == train and len(task["test"]) == test
    assert 0 <= len(task["validation"]) - round(0.1 * train) <= 10  # a few more where a question is asked twice
    rows = {r["id"]: r for split in ("train", "test") for r in pq.read_table(real_data / name / f"{split}.parquet").to_pylist()}
    for split in task.values():
        assert split.readout == "letters"
        for item in split:
            row = rows.pop(item["id"])
            assert item["choices"][item["answer"]] == row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])].strip()
            assert len(item["choices"]) == len(row["choices"]["text"]) and 3 <= len(item["choices"]) <= 5
    assert not rows  # so nothing is dropped and nothing is there twice


def test_real_yes_no_questions(real_data):
    task = bm.load_task(real_data / "boolq")
    assert (len(task["train"]), len(task["validation"]), len(task["test"])) == (8484, 943, 3270)
    assert {tuple(i["choices"]) for split in task.values() for i in split} == {("no", "yes")}
    assert {split.readout for split in task.values()} == {"cloze"}
    rows = {split: {r["question"].strip(): int(r["answer"]) for r in pq.read_table(real_data / "boolq" / f"{split}.parquet").to_pylist()}
            for split in ("train", "test")}
    for split, source in (("train", "train"), ("validation", "train"), ("test", "test")):
        assert all(rows[source][i["question"]] == i["answer"] for i in task[split])
    assert len({i["question"] for i in task["train"]} & {i["question"] for i in task["validation"]}) == 0
