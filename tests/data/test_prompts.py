"""Passages, examples in the prompt, chat templates and option tokens, against texts written out here."""

import re
import warnings

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import bmoe_utils as bm
from bmoe_utils.data.prompts import conversation, option_tokens, prompt
from bmoe_utils.data.tasks import Split
from bmoe_utils.models.embedded import train_tokenizer

WORDS = "Ice floats since it is less dense than the water below , which is why lakes freeze from above .".split()
ITEM = {"id": "ice", "question": "does ice float?", "choices": ["no", "yes", "at times"], "answer": 1, "passage": " ".join(WORDS)}
SHORT = {"id": "soot", "question": "is soot white?", "choices": ["no", "yes"], "answer": 0}
SHOTS = [{"id": "s1", "question": "is snow white?", "choices": ["no", "yes"], "answer": 1, "passage": "Snow is white."},
         {"id": "s2", "question": "is fire cold?", "choices": ["no", "yes"], "answer": 0}]
LETTERS = "Passage: {p}\nQuestion: does ice float?\nA. no\nB. yes\nC. at times\nAnswer:"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, with a token of its own at the start of every text, as many models have."""
    texts = [prompt(item, "letters") for item in (ITEM, SHORT, *SHOTS)] + [f" {x}" for x in "ABCDE"] * 50 + [" yes", " no"] * 50
    made = train_tokenizer(texts, 500)
    made.add_special_tokens({"bos_token": "<s>"})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    return made


def texts(loader, tokenizer):
    return [tokenizer.decode([t for t, m in zip(ids, mask) if m], clean_up_tokenization_spaces=False)
            for batch in loader for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())]


# ---- layout ---------------------------------------------------------------------------------------------------------
def test_the_passage_stands_before_the_question(tokenizer):
    assert prompt(ITEM, "letters") == LETTERS.format(p=ITEM["passage"])
    assert prompt(SHOTS[0], "cloze") == "Passage: Snow is white.\nQuestion: is snow white?\nAnswer:"
    assert prompt(ITEM | {"passage": ""}, "letters") == LETTERS.format(p="").removeprefix("Passage: \n")
    assert texts(bm.make_loader([ITEM, SHORT], tokenizer), tokenizer) == ["<s>" + prompt(i, "letters") for i in (ITEM, SHORT)]


@pytest.mark.parametrize("readout, answers", [("letters", [" B", " A"]), ("cloze", [" yes", " no"])])
def test_examples_stand_answered_before_each_question(readout, answers, tokenizer):
    items = [SHORT, ITEM] if readout == "letters" else [SHORT]
    loader = bm.make_loader(items, tokenizer, readout=readout, shots=SHOTS)
    before = "".join(f"{prompt(shot, readout)}{answer}\n\n" for shot, answer in zip(SHOTS, answers))
    assert texts(loader, tokenizer) == [f"<s>{before}{prompt(item, readout)}" for item in items]
    plain = bm.make_loader(items, tokenizer, readout=readout)
    for one, other in zip(loader, plain, strict=True):
        assert one["labels"].tolist() == other["labels"].tolist() and one["option_ids"].tolist() == other["option_ids"].tolist()


def test_a_chat_is_laid_out_by_the_tokenizer_s_own_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    asked = lambda item: prompt(item, "letters").removesuffix("\nAnswer:")
    user = lambda item: f"<|im_start|>user\n{asked(item)}<|im_end|>\n<|im_start|>assistant\n"
    answered = [user(shot) + f"Answer:{answer}<|im_end|>\n" for shot, answer in zip(SHOTS, (" B", " A"))]
    expected = "".join(answered) + user(SHORT) + "Answer:"
    loader = bm.make_loader([SHORT], tokenizer, chat=True, shots=SHOTS)
    assert texts(loader, tokenizer) == [expected]  # no <s>: the template writes what belongs there
    assert texts(bm.make_loader([SHORT], tokenizer, chat=True), tokenizer) == [user(SHORT) + "Answer:"]
    assert [turn["role"] for turn in conversation(SHORT, "letters", SHOTS)] == ["user", "assistant"] * 2 + ["user"]
    assert texts(bm.make_loader([SHORT], tokenizer), tokenizer) == ["<s>" + prompt(SHORT, "letters")]  # only when asked for
    (batch,) = loader
    assert batch["option_ids"].tolist() == [list(option_tokens(tokenizer, [" A", " B"]).values())]


def test_a_chat_without_a_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        bm.make_loader([SHORT], tokenizer, chat=True)


def test_examples_never_show_an_answer_that_is_asked_for(tokenizer):
    twin = SHOTS[1] | {"id": "another", "choices": SHOTS[1]["choices"][::-1]}
    with pytest.raises(ValueError, match="'another' is also one of the shots"):
        bm.make_loader([SHORT, twin], tokenizer, shots=SHOTS)
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"from the {split} split: take them from train"):
            bm.make_loader([SHORT], tokenizer, shots=Split(SHOTS, "letters", {"split": split}))
    for split in ("train", "dev"):
        bm.make_loader([SHORT], tokenizer, shots=Split(SHOTS, "letters", {"split": split}).subset(1))
    with pytest.raises(ValueError, match="shot 's9' has no answer"):
        bm.make_loader([SHORT], tokenizer, shots=[{"id": "s9", "question": "?", "choices": ["a", "b"]}])


# ---- cutting passages -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"shots": SHOTS}, {"chat": True}], ids=["plain", "shots", "chat"])
def test_a_long_passage_loses_its_end_and_nothing_else_is_touched(options, tokenizer, monkeypatch):
    """Every length from that without a passage to the whole one, against the longest prompt that fits by trying them all."""
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    rows = lambda item, **more: next(iter(bm.make_loader([item], tokenizer, **options, **more)))["input_ids"][0].tolist()
    by_words = [rows(ITEM | {"passage": " ".join(WORDS[:n])}) for n in range(len(WORDS) + 1)]
    for length in range(len(by_words[0]), len(by_words[-1])):
        with pytest.warns(UserWarning, match=f"1 of 2 passages were cut to fit max_length={length}"):
            loader = bm.make_loader([SHORT | {"question": "?"}, ITEM], tokenizer, max_length=length, **options)
        n = max(n for n, ids in enumerate(by_words) if len(ids) <= length)
        (batch,) = loader
        assert batch["input_ids"][1][batch["attention_mask"][1] == 1].tolist() == by_words[n]
        assert loader.cut_passages == {"ice": len(ITEM["passage"]) - len(" ".join(WORDS[:n]))}
        assert batch["option_ids"][1].tolist() == list(option_tokens(tokenizer, [f" {x}" for x in "ABC"]).values())
        text = tokenizer.decode(by_words[n], clean_up_tokenization_spaces=False)
        assert "Question: does ice float?\nA. no\nB. yes\nC. at times" in text and text.endswith("Answer:")


def test_nothing_is_cut_where_all_fits(tokenizer):
    whole = len(tokenizer.encode(prompt(ITEM, "letters")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (whole, None):
            loader = bm.make_loader([ITEM], tokenizer, max_length=length)
            assert loader.cut_passages == {} and texts(loader, tokenizer) == ["<s>" + LETTERS.format(p=ITEM["passage"])]


def test_a_passage_without_spaces_is_cut_inside(tokenizer):
    passage = "冰漂浮在水面上" * 30
    without = len(tokenizer.encode(prompt(ITEM | {"passage": ""}, "letters")))
    with pytest.warns(UserWarning, match="1 of 1"):
        loader = bm.make_loader([ITEM | {"passage": passage}], tokenizer, max_length=without + 200)
    (text,) = texts(loader, tokenizer)
    kept = re.match(r"<s>Passage: (.*)\n", text)[1]
    assert passage.startswith(kept) and len(kept) == len(passage) - loader.cut_passages["ice"] and 20 <= len(kept) < 210


def test_what_does_not_fit_without_its_passage_is_refused(tokenizer):
    without, whole = (len(tokenizer.encode(prompt(ITEM | {"passage": p}, "letters"))) for p in ("", ITEM["passage"]))
    said = rf"'ice' is {whole} tokens long \({without} without its passage\), more than max_length={without - 1}"
    with pytest.raises(ValueError, match=said):
        bm.make_loader([ITEM], tokenizer, max_length=without - 1)


# ---- one token an option --------------------------------------------------------------------------------------------
def test_letters_are_encoded_in_their_place():
    """A SentencePiece-like tokenizer begins every text with a space of its own: alone, ` A` would be two tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([prompt(ITEM, "letters") + f" {x}" for x in "ABCDE"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left")
    assert len(tokenizer.encode(" A", add_special_tokens=False)) == 2
    (batch,) = bm.make_loader([ITEM], tokenizer)
    whole = tokenizer.encode(prompt(ITEM, "letters"))
    for token, letter in zip(batch["option_ids"][0].tolist(), "ABC", strict=True):
        assert tokenizer.encode(prompt(ITEM, "letters") + f" {letter}") == whole + [token]
        assert tokenizer.convert_ids_to_tokens(token) == f"▁{letter}"


def test_cloze_options_of_several_tokens_are_refused_with_a_way_out(tokenizer):
    with pytest.raises(ValueError, match=r"' at times' is \d tokens for this tokenizer.*readout='letters'"):
        bm.make_loader([ITEM], tokenizer, readout="cloze")


def test_a_tokenizer_that_cuts_letters_is_refused_without_pointing_to_letters():
    with pytest.raises(ValueError, match="' A' is 2 tokens .*: a tokenizer that keeps single letters is needed"):
        bm.make_loader([SHORT], train_tokenizer(["x"], 258))
