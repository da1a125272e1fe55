"""A user's own question set, of two, three and five options, with unicode, in every format; and what is said of bad rows."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bmoe_utils as bm
from bmoe_utils.questions import MalformedQuestions, read_questions, to_item

# row, the right option's text
GOOD = [
    ({"question": "Is ice cold?", "choices": ["no", "yes"], "answer": 1}, "yes"),
    ({"question": "¿Cuál es más frío?", "choices": ["fuego", "niño 👶🏽", "hielo"], "answer": "C"}, "hielo"),
    ({"question": "北京在哪里？", "choices": ["中国", "日本"], "answer": "中国"}, "中国"),
    ({"question": "Was ist größer,\n„A“ oder \"B\"?", "choices": ["Maß", "größer", "ß", "Ü", "ä"], "answer": "E"}, "ä"),
    ({"question": "ما هو الأكبر؟", "choices": ["واحد", "اثنان", "ثلاثة"], "answer": 2}, "ثلاثة"),
    ({"question": "2 + 2?", "choices": ["3", "4", "5", "22", "2"], "answer": "4"}, "4"),  # 4 is also an index, of "2"
    ({"question": "Count!", "choices": ["1", "2", "3"], "answer": 0}, "1"),
    ({"question": "A zero-width one\u200b?", "choices": ["e", "e\u0301"], "answer": "\u00e9"}, "e\u0301"),  # two ways to write é
    ({"question": "  Spaces?  ", "choices": [" some ", "none"], "answer": " some "}, "some"),
    ({"question": "Who?", "choices": ["A", "B", "C"], "answer": "B"}, "B"),  # letter and text agree
    ({"question": "With a passage?", "choices": ["yes", "no"], "answer": "no", "passage": "Ein Satz.\u2028Noch einer.", "id": 7}, "no"),
    ({"question": "Twenty-six?", "choices": [f"o{i}" for i in range(26)], "answer": "Z"}, "o25"),
]

# what is wrong with a row: text of its line in a jsonl file
BAD = [
    ("no field 'question'", {"choices": ["a", "b"], "answer": 0}),
    ("the question is empty", {"question": " \t", "choices": ["a", "b"], "answer": 0}),
    ("question None is not text", {"question": None, "choices": ["a", "b"], "answer": 0}),
    ("question ['q'] is not text", {"question": ["q"], "choices": ["a", "b"], "answer": 0}),
    ("no field 'answer'", {"question": "q?", "choices": ["a", "b"]}),
    ("no field 'choices'", {"question": "q?", "answer": 0}),
    ("choices must be a list of 2 to 26 options", {"question": "q?", "choices": ["a"], "answer": 0}),
    ("choices must be a list of 2 to 26 options", {"question": "q?", "choices": [str(i) for i in range(27)], "answer": 0}),
    ("choices 'a, b' is not a JSON list such as", {"question": "q?", "choices": "a, b", "answer": 0}),
    ("an option is empty", {"question": "q?", "choices": ["a", ""], "answer": 0}),
    ("option None is not text", {"question": "q?", "choices": ["a", None], "answer": 0}),
    ("option True is not text", {"question": "q?", "choices": [True, False], "answer": 0}),
    ("answer 2 is not among the 2 options", {"question": "q?", "choices": ["a", "b"], "answer": 2}),
    ("answer -1 is not among the 2 options", {"question": "q?", "choices": ["a", "b"], "answer": -1}),
    ("answer 'C' is no index, letter or text of the options", {"question": "q?", "choices": ["a", "b"], "answer": "C"}),
    ("the right option 'é' is there twice", {"question": "q?", "choices": ["e\u0301", "\u00e9"], "answer": "\u00e9"}),
    ("answer 0.5 is no index, letter or text of the options", {"question": "q?", "choices": ["a", "b"], "answer": 0.5}),
    ("answer None is no index, letter or text of the options", {"question": "q?", "choices": ["a", "b"], "answer": None}),
    ("answer 'A' is the letter of one option and the text of another", {"question": "q?", "choices": ["B", "A"], "answer": "A"}),
    ("the right option 'a' is there twice", {"question": "q?", "choices": ["a", "a", "b"], "answer": 0}),
    ("passage [1] is not text", {"question": "q?", "choices": ["a", "b"], "answer": 0, "passage": [1]}),
    ("labels ['A'] do not fit the options ['a', 'b']",
     {"question": "q?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}),
    ("not JSON", '{"question": "cut sho'),
    ("a question is an object with fields, not [1, 2]", "[1, 2]"),
]  # fmt: skip


def jsonl(path, rows):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def csv_file(path, rows):
    rows = [{"passage": "", "id": ""} | r | {"choices": json.dumps(r["choices"], ensure_ascii=False)} for r in rows]
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as a spreadsheet program writes it
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_with_text_answers():
    """Parquet and arrow columns have one type."""
    return [{"passage": None, "id": None} | r | {"answer": str(r["answer"]).strip(), "id": str(r["id"]) if "id" in r else None}
            for r, _ in GOOD if r["question"] != "Count!"]


def right(items):
    return [item["choices"][item["answer"]] for item in items]


# ---- right answers --------------------------------------------------------------------------------------------------
def test_a_jsonl_file_of_different_numbers_of_options(tmp_path):
    items = read_questions(jsonl(tmp_path / "own.jsonl", [r for r, _ in GOOD]))
    assert right(items) == [text for _, text in GOOD]
    assert [len(i["choices"]) for i in items] == [len(r["choices"]) for r, _ in GOOD]
    for item, (row, _) in zip(items, GOOD, strict=True):
        assert item["question"] == row["question"].strip() and item["choices"] == [c.strip() for c in row["choices"]]
    assert items[10] == {"id": "7", "question": "With a passage?", "choices": ["yes", "no"], "answer": 1,
                         "passage": "Ein Satz.\u2028Noch einer."}
    assert items[0]["id"] == "own-00001" and "passage" not in items[0]


def test_the_same_in_csv_json_and_parquet(tmp_path):
    expected = [text for row, text in GOOD if row["question"] != "Count!"]
    rows = rows_with_text_answers()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    (tmp_path / "own.json").write_text(json.dumps(rows))
    assert right(read_questions(tmp_path / "own.parquet")) == right(read_questions(tmp_path / "own.json")) == expected
    rows = [r for r in rows if r["question"] != "2 + 2?"]
    assert right(read_questions(csv_file(tmp_path / "own.csv", rows))) == [text for text in expected if text != "4"]


def test_an_index_in_a_column_that_pandas_made_floats():
    assert to_item({"question": "q?", "choices": ["a", "b", "c"], "answer": 2.0})["answer"] == 2


@pytest.mark.parametrize("split", [True, False])
def test_a_folder_of_the_datasets_library(split, tmp_path):
    rows = rows_with_text_answers()
    own = datasets.Dataset.from_list(rows)
    if split:
        own = datasets.DatasetDict({"train": own.select(range(2, 11)), "test": own.select(range(2)), "notes": own.select([0])})
    own.save_to_disk(tmp_path / "own")
    task = bm.load_task(tmp_path / "own")
    assert list(task) == ["train", "validation", "test"]
    items = [item for part in task.values() for item in part]
    asked = {r["question"].strip(): r for r in rows}
    assert {i["question"] for i in items} == set(asked) and len(items) == len(rows)
    answers = {r["question"].strip(): text for r, text in GOOD}
    assert all(item["choices"][item["answer"]] == answers[item["question"]] for item in items)
    assert len(task["test"]) == 2
    if split:
        assert {i["question"] for i in task["test"]} == {r["question"].strip() for r in rows[:2]}


def test_a_single_file_is_cut_three_ways(tmp_path):
    rows = [{"question": f"q{i // 2}?", "choices": ["a", f"b{i // 2}"], "answer": i % 2} for i in range(200)]
    path = jsonl(tmp_path / "own.jsonl", rows)
    task = bm.load_task(path)
    asked = {k: {i["question"] for i in v} for k, v in task.items()}
    assert sum(len(v) for v in task.values()) == 200
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["validation"] and not asked["validation"] & asked["test"]
    assert 40 <= len(task["test"]) <= 80 and 12 <= len(task["validation"]) <= 32  # every question is there twice
    assert task == bm.load_task(path) and task != bm.load_task(path, seed=1)


def test_sharded_parquet_as_the_hub_names_it(tmp_path):
    rows = [{"question": f"q{i}?", "choices": ["a", f"b{i}"], "answer": 0} for i in range(30)]
    for i, part in enumerate((rows[:10], rows[10:20])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"train-0000{i}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[20:]), tmp_path / "test-00000-of-00001.parquet")
    task = bm.load_task(tmp_path)
    assert {i["question"] for i in [*task["train"], *task["validation"]]} == {f"q{i}?" for i in range(20)}
    jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match="train.jsonl, train-00000-of-00002.parquet, .*: leave one train file"):
        bm.load_task(tmp_path)


@pytest.mark.parametrize("answer", ["", "0", "3", "A"])
def test_where_a_layout_has_labels_of_its_own_nothing_else_counts(answer):
    """WinoGrande's 1 and 2 count from 1, and its unlabelled rows have an empty answer."""
    row = {"sentence": "Ann thanked Bea since _ helped.", "option1": "Ann", "option2": "Bea"}
    assert [to_item(row | {"answer": a}, answer_base=1)["answer"] for a in ("1", "2")] == [0, 1]
    with pytest.raises(ValueError, match=f"answer '{answer}' is (no index|not among the 2 options)"):
        to_item(row | {"answer": answer}, answer_base=1)
    labelled = {"question": "q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}}
    with pytest.raises(ValueError, match=f"answer '{answer}' is no index"):
        to_item(labelled | {"answerKey": answer})


# ---- right errors ---------------------------------------------------------------------------------------------------
def test_more_than_twenty_malformed_rows_are_all_named_by_file_and_line(tmp_path):
    assert len(BAD) >= 20
    rows = [row for (good, _), (_, bad) in zip(GOOD * 2, BAD, strict=True) for row in (good, bad)]
    with pytest.raises(MalformedQuestions) as error:
        read_questions(jsonl(tmp_path / "own.jsonl", rows))
    first, *lines = str(error.value).splitlines()
    assert first == f"{tmp_path / 'own.jsonl'}: {len(BAD)} malformed of {2 * len(BAD)} questions"
    for number, ((reason, _), line) in enumerate(zip(BAD, lines, strict=True), 1):
        assert line.startswith(f"  line {2 * number}: {reason}"), line
    assert [number for number, _ in error.value.faults] == list(range(2, 2 * len(BAD) + 1, 2))


def test_malformed_rows_of_every_split_are_named_at_once(tmp_path):
    for split, (reason, bad) in zip(("train", "validation", "test"), BAD):
        jsonl(tmp_path / f"{split}.jsonl", [GOOD[0][0], bad])
    with pytest.raises(ValueError) as error:
        bm.load_task(tmp_path)
    for split, (reason, _) in zip(("train", "validation", "test"), BAD):
        assert f"{tmp_path / split}.jsonl: 1 malformed of 2 questions\n  line 2: {reason}" in str(error.value)


def test_csv_rows_are_named_by_the_line_they_start_on(tmp_path):
    lines = ['question,choices,answer',
             '"two', 'lines?","[""a"", ""b""]",0',  # line 2, fine
             'q?,"[""a"", ""b""]",0,more',  # line 4
             'q?,a|b,0',
             '',
             'q?,"[""2"", ""1"", ""0""]",2',  # line 7: text of the first, index of the last
             'q?,"[""2"", ""1"", ""0""]",1',  # text and index are the same option
             '"q"?,"[""a"", ""b""]",0',  # line 9
             'q?,"[""a"", ""b""]",B']
    (tmp_path / "own.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(MalformedQuestions) as error:
        read_questions(tmp_path / "own.csv")
    first, second, *_ = str(error.value).splitlines()
    assert first == f"{tmp_path / 'own.csv'}: 4 malformed of 7 questions" and second == "  line 4: 4 cells where the header has 3"
    assert [number for number, _ in error.value.faults] == [4, 5, 7, 9]
    for (_, reason), expected in zip(error.value.faults[1:], ["choices 'a|b' is not a JSON list", "give its letter", "not CSV"]):
        assert expected in reason


def test_rows_of_a_saved_dataset_are_named_by_split_and_row(tmp_path):
    own = datasets.Dataset.from_list([{"question": "q?", "choices": ["a", "b"], "answer": a} for a in (0, 3, 1)])
    datasets.DatasetDict({"train": own, "test": own}).save_to_disk(tmp_path / "own")
    with pytest.raises(MalformedQuestions, match=r"own/train: 1 malformed of 3 questions\n  row 2: answer 3 is not among"):
        bm.load_task(tmp_path / "own")


@pytest.mark.parametrize("name, content, said", [
    ("own.parquet", b"no parquet", "is not a parquet file"), ("own.csv", b"", "holds no question"),
    ("own.jsonl", '{"question": "größer"}'.encode("utf-16"), "is not UTF-8 text"),
    ("own.txt", b"a question?", "questions are read from .parquet, .jsonl")])
def test_files_that_are_no_question_files(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        bm.load_task(tmp_path / name)


def test_too_few_questions_to_hold_some_out(tmp_path):
    with pytest.raises(ValueError, match="2 questions are too few"):
        bm.load_task(jsonl(tmp_path / "own.jsonl", [GOOD[0][0], GOOD[0][0]]))


def test_training_questions_that_are_in_test_are_kept_and_told(tmp_path):
    rows = [{"question": f"q{i}?", "choices": ["a", f"b{i}"], "answer": 0} for i in range(30)]
    jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", [rows[3] | {"choices": ["b3", "a"]}, rows[4] | {"question": "another?"}])
    with pytest.warns(UserWarning, match="of the training questions 1 are also in test, first 'train-00004'"):
        task = bm.load_task(tmp_path)
    assert len(task["train"]) + len(task["validation"]) == 30
