"""Question files in the layouts that people bring: a row or two of each as it is published, in short, and the right option."""

import csv
import json

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, List, Value

import bmoe_utils as bm
from bmoe_utils.data.layouts import literal
from bmoe_utils.data.questions import MalformedQuestions, read_questions


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def right(items):
    return [item["choices"][item["answer"]] for item in items]


SPEND = {"id": "MCQ-1", "question": "Where is iron stored?", "opa": "liver", "opb": "skin", "opc": "hair", "opd": "nail",
         "choice_type": "single", "exp": None, "subject_name": "Medicine", "topic_name": None}  # fmt: skip
ROOFS = {"ind": 4, "activity_label": "Removing ice from car", "ctx_a": "Then, the man writes over the snow.",
         "ctx_b": "then", "ctx": "Then, the man writes over the snow. then", "source_id": "activitynet~v_1",
         "endings": [", the man adds wax to the windshield.", ", a person boards a ski lift."], "split": "train",
         "split_type": "indomain"}  # fmt: skip
TRACY = {"context": "Tracy didn't go home that evening and resisted Riley's attacks.",
         "question": "What does Tracy need to do before this?", "answerA": "make a new plan",
         "answerB": "Go home and see Riley", "answerC": "Find somewhere to go"}  # fmt: skip
# name: rows, and of each the right option, with the question and the passage of the first
LAYOUTS = {
    "MMLU-Pro": (
        [{"question_id": 70, "question": "Typical advertising regulatory bodies suggest …", "category": "business",
          "options": ["Safe practices", "Unsafe practices", "Wants"], "answer": "B", "answer_index": 1, "cot_content": "", "src": "x"},
         {"question_id": 71, "question": "Which?", "options": [f"o{i}" for i in range(10)], "answer": "J", "answer_index": 9}],
        ["Unsafe practices", "o9"], "Typical advertising regulatory bodies suggest …", None),
    "MMLU-Pro without its letter": (
        [{"question": "q?", "options": ["a", "b", "c"], "answer_index": 0}, {"question": "r?", "options": ["a", "2"], "answer_index": 1}],
        ["a", "2"], "q?", None),
    "HellaSwag": ([ROOFS | {"label": "1"}, ROOFS | {"label": "0"}], [ROOFS["endings"][1], ROOFS["endings"][0]], ROOFS["ctx"], None),
    "HellaSwag in two parts": (
        [{k: v for k, v in ROOFS.items() if k != "ctx"} | {"label": "0"}], [ROOFS["endings"][0]], ROOFS["ctx"], None),
    "PIQA": (
        [{"goal": "How do I ready a guinea pig cage?", "sol1": "Provide paper bedding.", "sol2": "Provide jeans.", "label": 0},
         {"goal": "dresser", "sol1": "replace drawer with bobby pin", "sol2": "finish, woodgrain with bobby pin", "label": 1}],
        ["Provide paper bedding.", "finish, woodgrain with bobby pin"], "How do I ready a guinea pig cage?", None),
    "SIQA": (
        [TRACY | {"label": "3"}, TRACY | {"label": "1"}], ["Find somewhere to go", "make a new plan"], TRACY["question"], TRACY["context"]),
    "COPA": (
        [{"premise": "My body cast a shadow.", "choice1": "The sun was rising.", "choice2": "The grass was cut.", "question": "cause",
          "idx": 0, "label": 0, "mistake": False},
         {"premise": "I pushed the door.", "choice1": "It locked.", "choice2": "It opened.", "question": "effect", "idx": 1, "label": 1}],
        ["The sun was rising.", "It opened."], "My body cast a shadow. What was the cause of this?", None),
    "RACE": (
        [{"example_id": "high1.txt", "article": "Last week I talked with some students.", "question": "Whom did I talk with?",
          "options": ["doctors", "teachers", "students", "nobody"], "answer": "C"}], ["students"], "Whom did I talk with?",
        "Last week I talked with some students."),
    "MedQA": (
        [{"question": "A 23-year-old?", "answer": "Nitrofurantoin", "options": {"A": "Ampicillin", "B": "Nitrofurantoin"},
          "meta_info": "step2&3", "answer_idx": "B", "metamap_phrases": ["23 year old"]}], ["Nitrofurantoin"], "A 23-year-old?", None),
    "MedQA by keys": (
        [{"question": "A 24-year-old?", "answer": "Doxycycline", "answer_idx": "A", "meta_info": "step1",
          "options": [{"key": "A", "value": "Doxycycline"}, {"key": "B", "value": "Oseltamivir"}]}], ["Doxycycline"], "A 24-year-old?", None),
    "LogiQA": (
        [{"context": "Some Cantonese don't like chili.", "query": "Which can be inferred?", "options": ["a", "b", "c", "d"], "correct_option": 3},
         {"context": "c", "query": "q?", "options": ["a", "b", "c", "d"], "correct_option": 0}],
        ["d", "a"], "Which can be inferred?", "Some Cantonese don't like chili."),
    "LogiQA of AGIEval": (
        [{"passage": "A doctor.", "question": "Which?", "options": ["(A)One", "(B)Two"], "label": "B", "answer": None, "other": None}],
        ["(B)Two"], "Which?", "A doctor."),
    "LogiQA of AGIEval's hub copy": (
        [{"query": "Q: Which? A:", "choices": ["(A)One", "(B)Two", "(C)Three"], "gold": [0]},
         {"query": "Q: And? A:", "choices": ["(A)One", "(B)Two", "(C)Three"], "gold": [2]}], ["(A)One", "(C)Three"], "Q: Which? A:", None),
    "AI2's nested files": (
        [{"id": "Mercury_1", "question": {"stem": "Which is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
          "answerKey": "B"},
         {"id": "Mercury_2", "answerKey": "4", "question": {"stem": "s?", "choices": [{"text": f"t{i}", "label": str(i)} for i in (1, 2, 3, 4)]}}],
        ["fire", "t4"], "Which is hot?", None),
    "MedMCQA as released": ([SPEND | {"cop": 1}, SPEND | {"cop": 4}], ["liver", "nail"], SPEND["question"], None),
    "MedMCQA as on the hub": ([SPEND | {"cop": 1}, SPEND | {"cop": 0}], ["skin", "liver"], SPEND["question"], None),
    "label for answer": (
        [{"question": "q?", "choices": ["a", "b", "c"], "label": 0}, {"question": "q?", "choices": ["a", "b", "c"], "label": 2}],
        ["a", "c"], "q?", None),
    "float indices": (
        [{"question": "q?", "choices": ["a", "b", "c"], "answer": "2.0"}, {"question": "q?", "choices": ["a", "b"], "answer": 0.0}],
        ["c", "a"], "q?", None),
    "BoolQ as text": ([{"question": "is ice cold", "passage": "Ice is.", "answer": "True"}], ["yes"], "is ice cold", "Ice is."),
    "characters composed another way": (
        [{"question": "q?", "choices": ["caffe\u0300", "th\u00e9"], "answer": "caff\u00e8"},
         {"question": "q?", "choices": ["caffe\u0300", "th\u00e9"], "answer": "the\u0301"}], ["caffe\u0300", "th\u00e9"], "q?", None),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_as_it_is_published(name, tmp_path):
    rows, expected, question, passage = LAYOUTS[name]
    items = read_questions(jsonl(tmp_path / "some.jsonl", rows))
    assert right(items) == expected
    assert items[0]["question"] == question and items[0].get("passage") == passage
    assert items[0]["id"] == str(rows[0].get("id", "some-00001"))


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "LogiQA of AGIEval's hub copy" and "float" not in n and "characters" not in n])
def test_the_same_through_pandas_to_csv_and_parquet(name, tmp_path):
    """Lists and objects become text in a CSV file's cells."""
    rows, expected, *_ = LAYOUTS[name]
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "some.csv", index=False)
    table.to_parquet(tmp_path / "some.parquet")
    assert right(read_questions(tmp_path / "some.parquet")) == expected
    if "nested" not in name:  # whose cells are objects with everything in them
        assert right(read_questions(tmp_path / "some.csv")) == expected


def test_arc_from_parquet_through_pandas_to_csv(tmp_path):
    """What pandas reads from parquet are arrays, and a cell is what these print."""
    rows = [{"id": "a", "question": "q?", "choices": {"text": ["it's, \"so\"", "b])"], "label": ["A", "B"]}, "answerKey": "B"},
            {"id": "b", "question": "q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "arc.parquet")
    pandas.read_parquet(tmp_path / "arc.parquet").to_csv(tmp_path / "arc.csv")
    assert "array([" in (tmp_path / "arc.csv").read_text()
    assert right(read_questions(tmp_path / "arc.csv")) == ["b])", "x"]
    rows = [{"question": "q?", "choices": ["it's", "a 'b' 'c'", "d"], "answer": 1}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmlu.parquet")
    pandas.read_parquet(tmp_path / "mmlu.parquet").to_csv(tmp_path / "mmlu.csv")
    assert right(read_questions(tmp_path / "mmlu.csv")) == ["a 'b' 'c'"]


@pytest.mark.parametrize("value", [["a"], ["it's", 'say "x"', "a' 'b"], ["a" * 40] * 5, ["1", "2"], [3, 4]])
def test_a_list_is_read_from_any_of_its_spellings(value):
    array = np.array(value, dtype=object)
    assert literal(json.dumps(value)) == literal(str(value)) == literal(str(array)) == literal(repr(array)) == value


@pytest.mark.parametrize("cell", ["__import__('os').getcwd()", "[open('x')]", "[array(open('x'))]", "array", "[x for x in 'ab']",
                                  "a, b", "['a'", "(" * 5000, "[" * 100_000, "['a' ['b']]", "", "\x00", "[" + "9" * 5000 + "]"])  # fmt: skip
def test_nothing_but_values_is_read_from_a_cell(cell):
    with pytest.raises(ValueError, match="is not a JSON list such as") as error:
        literal(cell)
    assert len(str(error.value)) < 250


def test_a_csv_file_without_a_header(tmp_path):
    """As MMLU's authors published it."""
    lines = [["Find 2 + 2, \"quickly\"", "0", "4", "2", "6", "B"], ["Let p = (1, 2)", "8", "2", "24", "120", "C"]]
    with (tmp_path / "abstract_algebra_test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    items = read_questions(tmp_path / "abstract_algebra_test.csv")
    assert right(items) == ["4", "24"] and [i["question"] for i in items] == [line[0] for line in lines]
    assert items[0]["choices"] == ["0", "4", "2", "6"]
    with (tmp_path / "headed.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "question", "A", "B", "C", "D", "answer"], ["7", "q?", "a", "b", "c", "", "C"]])
    assert read_questions(tmp_path / "headed.csv") == [{"id": "7", "question": "q?", "choices": ["a", "b", "c"], "answer": 2}]


def test_truthfulqa_s_right_answer_is_not_always_the_first(tmp_path):
    """It stands first in every row of the file."""
    rows = [{"question": f"q{i}?", "mc1_targets": {"choices": ["right", "w1", "w2", "w3"], "labels": [1, 0, 0, 0]},
             "mc2_targets": {"choices": ["right"], "labels": [1]}} for i in range(200)]  # fmt: skip
    items = read_questions(jsonl(tmp_path / "tqa.jsonl", rows))
    assert set(right(items)) == {"right"}
    places = np.bincount([item["answer"] for item in items], minlength=4)
    assert (places > 25).all(), places  # 50 +- 4 standard deviations (6.1)
    assert right(read_questions(jsonl(tmp_path / "tqa.jsonl", rows[::-1]))) == ["right"] * 200
    pandas.DataFrame(rows).to_csv(tmp_path / "tqa.csv")
    assert read_questions(tmp_path / "tqa.csv")[7]["choices"] == items[7]["choices"]
    two = {"choices": ["a", "b"], "labels": [1, 1]}
    with pytest.raises(MalformedQuestions, match="line 1: mc1_targets .* do not mark one of their options"):
        read_questions(jsonl(tmp_path / "two.jsonl", [{"question": "q?", "mc1_targets": two}]))


@pytest.mark.parametrize("names, expected", [(list("ABC"), list("abc")), (list("CAB"), list("cab")), (["one", "two", "three"], list("abc")),
                                             (list("123"), list("abc")), (list("abc"), list("abc"))])  # fmt: skip
def test_class_labels_are_indices_or_the_letters_that_they_are_called(names, expected, tmp_path):
    """A column of classes 1 and 2 alone tells nothing by its numbers; its classes do."""
    features = Features({"question": Value("string"), "options": List(Value("string")), "label": ClassLabel(names=names)})
    rows = [{"question": f"q{i}?", "options": list("abc"), "label": i % 2 + 1} for i in range(20)]
    own = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": own, "test": own.select([0, 1])}).save_to_disk(tmp_path / "own")
    with pytest.warns(UserWarning, match="also in test"):
        assert right(bm.load_task(tmp_path / "own")["test"]) == expected[1:]
    own.to_parquet(tmp_path / "own.parquet")
    assert right(read_questions(tmp_path / "own.parquet")[:2]) == expected[1:]


@pytest.mark.parametrize("row, said", [
    ({"question": "q?", "options": ["a", "b", "c"], "answer": "A", "answer_index": 2}, "answer 'A' and 2 are different options"),
    ({"question": "q?", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "y"}, "answer 'A' and 'y' are different options"),
    ({"question": "q?", "options": [{"key": "A", "value": "x"}, {"key": "A", "value": "y"}], "answer_idx": "A"}, "are not all different"),
    (ROOFS | {"label": ""}, "answer '' is no index"),
    ({"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "answer -1 is not among the 2 options"),
    ({k: v for k, v in SPEND.items() if k != "opc"} | {"cop": 0}, "no field 'opc'"),
    ({"premise": "p", "question": "why", "choice1": "a", "choice2": "b", "label": 0}, "question 'why' is neither 'cause' nor 'effect'"),
    ({"question": {"stem": "q?", "choices": [{"text": "a", "label": "A"}]}}, "no field 'answerKey'"),
    ({"question": {"stem": "q?"}, "answerKey": "A"}, "no field 'choices'"),
    ({"question": "q?", "options": {"A": "x", "B": "y"}, "answer": "C"}, "answer 'C' is no index"),
])  # fmt: skip
def test_faults_in_these_layouts(row, said, tmp_path):
    fine = {"question": "q?", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(MalformedQuestions, match="1 malformed of 2 questions\n  line 2: ") as error:
        read_questions(jsonl(tmp_path / "some.jsonl", [fine, row]))
    assert said in str(error.value)


def test_an_explanation_beside_the_answer_is_no_second_answer(tmp_path):
    row = {"question": "q?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "Because y is larger."}
    assert right(read_questions(jsonl(tmp_path / "some.jsonl", [row]))) == ["y"]
