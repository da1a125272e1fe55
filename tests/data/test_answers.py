"""What answers count from: told by the rows of all files together, or asked for; never guessed."""

import json

import pandas
import pytest

import bmoe_utils as bm
from bmoe_utils.data.questions import MalformedQuestions, read_questions


def medmcqa(answers, n=4):
    return [{"question": f"q{i}?", **{f"op{x}": f"{x}{i}" for x in "abcdefgh"[:n]}, "cop": cop} for i, cop in enumerate(answers)]


def siqa(answers):
    return [{"context": "c", "question": f"q{i}?", "answerA": "a", "answerB": "b", "answerC": "c", "label": a} for i, a in enumerate(answers)]


def options(answers, choices="abcd", column="answer"):
    return [{"question": f"q{i}?", "options": list(choices), column: a} for i, a in enumerate(answers)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def indices(path, **how):
    return [item["answer"] for item in read_questions(path, **how)]


@pytest.mark.parametrize("make", [medmcqa, options])
@pytest.mark.parametrize("answers, expected", [
    ([1, 3, 0, 2], [1, 3, 0, 2]), ([1, 3, 4, 2], [0, 2, 3, 1]), ([0], [0]), ([4, 4], [3, 3]),
    (["1", "4"], [0, 3]), (["0", "1"], [0, 1]), ([1.0, 4.0], [0, 3])])  # fmt: skip
def test_a_zero_or_the_number_of_options_tells(make, answers, expected, tmp_path):
    assert indices(jsonl(tmp_path / "own.jsonl", make(answers))) == expected


@pytest.mark.parametrize("make", [medmcqa, options, lambda answers: options(answers, column="label")])
@pytest.mark.parametrize("answers", [[1, 2, 3], ["1", "2"], [1], [3.0, 2.0]])
def test_where_nothing_tells_the_file_is_refused_until_it_is_stated(make, answers, tmp_path):
    path = jsonl(tmp_path / "own.jsonl", make(answers))
    with pytest.raises(ValueError, match="own.jsonl: it cannot be told whether .* count from 0 or from 1.*answer_base=0 or") as error:
        read_questions(path)
    assert "\n" not in str(error.value)
    values = [int(float(a)) for a in answers]
    assert indices(path, answer_base=0) == values and indices(path, answer_base=1) == [v - 1 for v in values]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_same_in_other_formats(suffix, tmp_path):
    for answers, expected in (([1, 2, 3], None), ([1, 2, 4], [0, 1, 3]), ([2, 1, 0], [2, 1, 0])):
        table, path = pandas.DataFrame(medmcqa(answers)), tmp_path / f"own.{suffix}"
        table.to_csv(path) if suffix == "csv" else table.to_parquet(path)
        if expected is None:
            with pytest.raises(ValueError, match="it cannot be told"):
                read_questions(path)
        else:
            assert indices(path) == expected


def test_all_splits_are_looked_at_together(tmp_path):
    jsonl(tmp_path / "train.jsonl", medmcqa([1, 2, 3] * 5))
    jsonl(tmp_path / "test.jsonl", [row | {"question": "t" + row["question"]} for row in medmcqa([2, 4])])
    task = bm.load_task(tmp_path)
    assert [item["answer"] for item in task["test"]] == [1, 3]
    assert {item["answer"] for split in ("train", "validation") for item in task[split]} == {0, 1, 2}
    jsonl(tmp_path / "test.jsonl", [row | {"question": "t" + row["question"]} for row in medmcqa([2, 3])])
    with pytest.raises(ValueError, match="train.jsonl, .*test.jsonl: it cannot be told"):
        bm.load_task(tmp_path)
    assert [item["answer"] for item in bm.load_task(tmp_path, answer_base=0)["test"]] == [2, 3]
    assert [item["answer"] for item in bm.load_task(tmp_path, answer_base=1)["test"]] == [1, 2]


def test_each_row_is_held_against_its_own_number_of_options(tmp_path):
    rows = options([2], "abc") + options([3], "abcde") + options([2], "ab")
    assert indices(jsonl(tmp_path / "own.jsonl", rows)) == [1, 2, 1]
    with pytest.raises(ValueError, match="they are 2, 3, never 0"):
        indices(jsonl(tmp_path / "own.jsonl", rows[:2]))


def test_our_own_layout_counts_from_0_as_documented(tmp_path):
    rows = [{"question": "q?", "choices": list("abcd"), "answer": a} for a in (1, 2, 3)]
    assert indices(jsonl(tmp_path / "own.jsonl", rows)) == [1, 2, 3]
    assert indices(tmp_path / "own.jsonl", answer_base=1) == [0, 1, 2]
    with pytest.raises(MalformedQuestions, match=r"line 2: answer 4 is not among the 4 options, counted from 0 \(answer_base=1 where"):
        indices(jsonl(tmp_path / "own.jsonl", [rows[0], rows[0] | {"answer": 4}]))


def test_letters_texts_and_labels_tell_nothing_and_need_nothing(tmp_path):
    assert indices(jsonl(tmp_path / "own.jsonl", options(["B", "C", "d"]))) == [1, 2, 3]
    arc = [{"question": "q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": k} for k in ("1", "2")]
    assert indices(jsonl(tmp_path / "own.jsonl", arc)) == [0, 1]
    arc = [{"question": "q?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": k} for k in (1, 2)]
    with pytest.raises(ValueError, match="it cannot be told whether the answers in 'answerKey'"):
        indices(jsonl(tmp_path / "own.jsonl", arc))


@pytest.mark.parametrize("make", [medmcqa, options])
def test_a_zero_and_the_number_of_options_cannot_both_be(make, tmp_path):
    with pytest.raises(MalformedQuestions) as error:
        indices(jsonl(tmp_path / "own.jsonl", make([0, 4, 1, 4])))
    assert [number for number, _ in error.value.faults] == [2, 4]
    with pytest.raises(MalformedQuestions) as error:
        indices(tmp_path / "own.jsonl", answer_base=1)
    assert error.value.faults == [(1, "answer 0 is not among the 4 options, counted from 1")]


def test_letters_among_numbers_are_named(tmp_path):
    with pytest.raises(MalformedQuestions, match="answer 'B' is a letter where most of 'answer' are numbers") as error:
        indices(jsonl(tmp_path / "own.jsonl", options([0, 1, "B", 2])))
    assert [number for number, _ in error.value.faults] == [3]
    with pytest.raises(MalformedQuestions, match="line 2: answer 0 is a number where most of 'answer' are letters"):
        indices(jsonl(tmp_path / "own.jsonl", options(["A", 0, "B"])))


def test_a_number_that_is_one_option_s_text_and_another_s_index_is_refused(tmp_path):
    with pytest.raises(MalformedQuestions, match="line 1: answer '2' is the text of one option and the index of another"):
        indices(jsonl(tmp_path / "own.jsonl", options(["2", "0"], "21ab")))
    assert indices(jsonl(tmp_path / "own.jsonl", siqa(["3", "1"]))) == [2, 0]
    rows = [row | {"answerA": "3", "answerB": "2", "answerC": "1"} for row in siqa(["3", "1"])]
    assert indices(jsonl(tmp_path / "own.jsonl", rows)) == [2, 0]  # where a column holds numbers alone


def test_unlabelled_rows_decide_nothing(tmp_path):
    with pytest.raises(MalformedQuestions, match="3 malformed of 3 questions, all alike\n  line 1: answer -1 is not among") as error:
        indices(jsonl(tmp_path / "own.jsonl", medmcqa([-1, -1, -1])))
    assert len(error.value.faults) == 3
    with pytest.raises(ValueError, match="they are 1, 2, never 0"):
        indices(jsonl(tmp_path / "own.jsonl", medmcqa([-1, 1, 2])))


def test_answer_base_is_0_or_1_and_for_own_files_alone(tmp_path):
    path = jsonl(tmp_path / "own.jsonl", medmcqa([1]))
    for wrong in (2, "1"):
        with pytest.raises(ValueError, match="answer_base is 0 or 1 .or None: the files tell., not "):
            read_questions(path, answer_base=wrong)
    for name in ("world", "medmcqa"):
        with pytest.raises(ValueError, match="answer_base is for your own files"):
            bm.load_task(name, answer_base=1)
