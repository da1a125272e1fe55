"""A user's own question set, of two, three and five options, with unicode, in every format; and what is said of bad rows."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bmoe_utils as bm
from bmoe_utils.data.questions import MalformedQuestions, read_questions, to_item

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


# ---- hostile and careless input -------------------------------------------------------------------------------------
FINE = {"question": "q?", "choices": ["a", "b"], "answer": 0}


def with_value(field, text):
    """A line of JSON whose ``field`` is this text as it is."""
    return json.dumps(FINE | {field: "HERE"}).replace('"HERE"', text)


HOSTILE = {  # a line after two fine ones, and what is said of it
    "deep": ("[" * 100_000 + "]" * 100_000, "not JSON that can be read (nested too deeply)"),
    "deep inside": (with_value("choices", "[" * 50_000 + "]" * 50_000), "not JSON that can be read (nested too deeply)"),
    "rather deep": (with_value("question", "[" * 400 + "]" * 400), "question [[[[[...]]]]] is not text"),
    "5000 digits": (with_value("answer", "1" * 5000), "not JSON that can be read (a number of 5000 digits)"),
    "5000 digits elsewhere": (with_value("year", "1" * 5000), "not JSON that can be read (a number of 5000 digits)"),
    "5000 digits as text": (with_value("answer", f'"{"1" * 5000}"'), "answer '111"),
    "surrogate": (with_value("question", r'"a\ud800"'), r"question 'a\ud800' holds half a character (a lone surrogate)"),
    "surrogate option": (with_value("choices", r'["a", "\udfff"]'), r"option '\udfff' holds half a character"),
    "surrogate passage": (with_value("passage", r'"\ud83d"'), r"passage '\ud83d' holds half a character"),
    "surrogate id": (with_value("id", r'"\ud83d"'), r"id '\ud83d' holds half a character"),
    "NUL": (with_value("question", r'"q\u0000?"'), r"question 'q\x00?' holds a NUL character"),
    "NaN": (with_value("question", "NaN"), "question nan is not text"),
    "infinite": (with_value("choices", '[Infinity, "b"]'), "option inf is not text"),
    "infinite answer": (with_value("answer", "1e999"), "answer inf is no index"),
    "long answer": (with_value("answer", f'"{"x" * 1_000_000}"'), "answer 'xxx"),
    "long row": (json.dumps(["x" * 1_000_000] * 3), "a question is an object with fields, not ['xxx"),
    "long text for options": (with_value("choices", f'"{"x y " * 250_000}"'), "choices 'x y x y"),
    "100000 options": (with_value("choices", json.dumps(["x"] * 100_000)), "choices must be a list of 2 to 26 options"),
    "two ways to write it": (with_value("choices", '["é", "e\u0301"]'), "the right option 'é' is there twice"),
    "id of lists": (with_value("id", json.dumps([[1] * 1000])), "id [[1, 1, 1, 1, 1, 1, ...]] is not text"),
    "answer of lists": (with_value("answer", "[0, 1]"), "answer [0, 1] is no index"),
    "spaces apart": (with_value("choices", '["a", " a "]'), "the right option 'a' is there twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_is_named_in_a_line(name, tmp_path):
    line, said = HOSTILE[name]
    with pytest.raises(MalformedQuestions) as error:
        read_questions(jsonl(tmp_path / "own.jsonl", [FINE, FINE, line]))
    assert str(error.value).startswith(f"{tmp_path / 'own.jsonl'}: 1 malformed of 3 questions\n  line 3: {said}")
    assert len(str(error.value)) < 400 and str(error.value).count("\n") == 1
    str(error.value).encode()  # can be printed


@pytest.mark.parametrize("name, content, said", [
    ("deep.json", "[" * 100_000 + "]" * 100_000, "is not JSON that can be read .nested too deeply"),
    ("digits.json", '[{"answer": ' + "1" * 5000 + "}]", "is not JSON that can be read .a number of 5000 digits"),
    ("deep.csv", 'question,choices,answer\nq?,"' + "[" * 100_000 + '",0\n', r"line 2: choices '\[\["),
    ("tuples.csv", 'question,choices,answer\nq?,"' + "(" * 20_000 + '",0\n', r"line 2: choices '\(\("),
    ("twice.csv", 'question,choices,choices,answer\nq?,"[1, 2]","[3, 4]",0\n', "the header has 'choices' twice"),
    ("semicolons.csv", 'question;choices;answer\nq?;["a", "b"];0\n', "has one column, 'question;choices;answer': .*separated by ';'"),
    ("tabs.csv", "question\tchoices\nq?\ta\n", r"separated by '\\t'"),
    ("zipped.jsonl", b"\x1f\x8b\x08\x00", "is not UTF-8 text"),
    ("short.parquet", b"", "is not a parquet file"),
    ("thrift.parquet", b"PAR1" + b"\xff" * 40 + b"\x28\x00\x00\x00PAR1", "is not a parquet file"),
    ("blank.jsonl", "\n \n", "holds no question"), ("bom.jsonl", b"\xef\xbb\xbf", "holds no question"), ("none.json", "[]", "holds no question"),
    ("object.json", json.dumps({"version": 1, "data": [FINE]}, indent=1), "line 1: no field 'question'\n  fields found: version, data"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "")
def test_a_hostile_file_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name}(.|\n)*{said}") as error:
        bm.load_task(tmp_path / name)
    assert max(map(len, str(error.value).splitlines())) < 500 and str(error.value).count("\n") <= 4


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    lines = [json.dumps(FINE), json.dumps(FINE | {"answer": "b"})]
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert right(read_questions(tmp_path / "own.jsonl")) == ["a", "b"]
    (tmp_path / "own.csv").write_bytes(b'\xef\xbb\xbfquestion,choices,answer\r\nq?,"[""a"", ""b""]",1\r\n')
    assert right(read_questions(tmp_path / "own.csv")) == ["b"]


def test_missing_ids_and_passages_of_pandas_are_none(tmp_path):
    items = read_questions(jsonl(tmp_path / "own.jsonl", [with_value("id", "NaN"), with_value("passage", "NaN")]))
    assert [i["id"] for i in items] == ["own-00001", "own-00002"] and "passage" not in items[1]


@pytest.mark.parametrize("name, write, renamed", [
    ("own.jsonl", jsonl, "pandas.read_json('{}', lines=True).rename(columns={{'YOURS': 'question'}}).to_json("),
    ("own.json", lambda path, rows: path.write_text(json.dumps(rows)), "pandas.read_json('{}').rename("),
    ("own.parquet", lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path), "pandas.read_parquet('{}').rename("),
    ("own", lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path), "datasets.load_from_disk('{}').to_pandas().rename("),
])
def test_where_all_rows_fail_alike_one_is_named_and_how_to_rename_the_fields(name, write, renamed, tmp_path):
    rows = [{"prompt": f"q{i}?", "possible": ["a", "b"], "right_one": i % 2} for i in range(300)]
    path = tmp_path / name
    write(path, rows)
    with pytest.raises(MalformedQuestions) as error:
        bm.load_task(path)
    first, line, found, expected, how = str(error.value).splitlines()
    assert first == f"{path}: 300 malformed of 300 questions, all alike" and line.endswith(" 1: no field 'question'")
    assert found == "  fields found: prompt, possible, right_one" and expected.startswith("  fields expected: question, choices (")
    assert how.startswith("  to rename them: " + renamed.format(path)) and len(error.value.faults) == 300


def test_what_is_said_to_rename_the_fields_does_so(tmp_path, monkeypatch):
    import pandas

    monkeypatch.chdir(tmp_path)
    rows = [{"YOURS": "q?", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    csv_file(tmp_path / "d.csv", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    for name, new in (("a.jsonl", "json"), ("b.json", "json"), ("c.parquet", "parquet"), ("d.csv", "csv"), ("e", "parquet")):
        with pytest.raises(MalformedQuestions) as error:
            bm.load_task(tmp_path / name)
        eval(str(error.value).rpartition("to rename them: ")[2], {"pandas": pandas, "datasets": datasets})
        assert right(read_questions(tmp_path / f"renamed.{new}")) == ["a", "b"] * 2


def test_rows_that_fail_for_the_same_reason_with_other_values_are_alike(tmp_path):
    rows = [{"ctx": "c", "endings": ["a", "b"], "label": str(i + 2)} for i in range(9)]
    rows = [row | {"label": f"x{i}"} for i, row in enumerate(rows)]
    with pytest.raises(MalformedQuestions, match="9 malformed of 9 questions, all alike\n  line 1: answer 'x0' is no index"):
        read_questions(jsonl(tmp_path / "own.jsonl", rows))
    rows[4] = FINE | {"question": ""}  # one that fails otherwise
    with pytest.raises(MalformedQuestions, match="9 malformed of 9 questions\n  line 1") as error:
        read_questions(jsonl(tmp_path / "own.jsonl", rows))
    assert str(error.value).count("\n  line ") == 9


def test_a_folder_without_files_of_ours_says_what_is_there(tmp_path):
    for name in ("train.jsonl.gz", "test.jsonl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no train file \(.parquet, .*\); there are: test.jsonl, train.jsonl.gz"):
        jsonl(tmp_path / "test.jsonl", [FINE])
        bm.load_task(tmp_path)


@pytest.mark.parametrize("name, content", [("dataset_dict.json", "{"), ("state.json", "{}")])
def test_a_damaged_dataset_folder_is_named(name, content, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_text(content)
    with pytest.raises(ValueError, match="own cannot be read as a dataset that was saved: "):
        bm.load_task(tmp_path / "own")
