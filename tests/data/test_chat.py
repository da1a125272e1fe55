"""Where ``Answer:`` goes in chats laid out by templates in the style of real ones, and which
special tokens stand around a prompt."""

import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import bmoe_utils as bm
from bmoe_utils.data.prompts import option_tokens, prompt

ITEM = {"id": "soot", "question": "is soot white?", "choices": ["no", "yes"], "answer": 0}
SHOT = {"id": "snow", "question": "is snow white?", "choices": ["no", "yes"], "answer": 1}
ASKED, SHOWN = (prompt(item, "letters").removesuffix("\nAnswer:") for item in (ITEM, SHOT))
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|header|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<think>",
    "</think>",
    "<User>",
    "<Assistant>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# the last answer with its empty reasoning, earlier ones without
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
    "{% else %}<Assistant>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|header|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
USERS_ONLY = (
    "{% for m in messages %}"
    "{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
    "<User>{{ m.content }}{% endfor %}<Assistant>"
)
OTHERWISE = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}"
    "{% else %}<Assistant>final {{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant> hm {% endif %}"
)
IM = (
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nAnswer: B<|im_end|>\n<|im_start|>user\n"
)

# template, its arguments, what it makes of the shot, what stands between the question and Answer:
LAYOUTS = {
    "chatml": (
        CHATML,
        {},
        IM,
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "harmony": (
        HARMONY,
        {},
        "<|start|>user<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>Answer: "
        "B<|end|>"
        "<|start|>user<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "qwen3": (
        QWEN3,
        {},
        IM,
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "qwen3 told": (
        QWEN3,
        {"chat_template_kwargs": {"enable_thinking": False}},
        IM,
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "r1 closed": (
        R1,
        {"assistant_prefix": "</think>\n\n"},
        "<s><User>{}<Assistant>Answer: B</s><User>",
        "<Assistant><think>\n</think>\n\n",
    ),
    "llama3": (
        LLAMA3,
        {},
        "<s><|header|>user<|header|>\n\n{}<|eot|><|header|>assistant<|header|>\n\nAnswer: B<|eot|>"
        "<|header|>user<|header|>\n\n",
        "<|eot|><|header|>assistant<|header|>\n\n",
    ),
    "mistral": (MISTRAL, {}, "<s>[INST] {} [/INST] Answer: B</s>[INST] ", " [/INST] "),
    "mistral bare": (
        MISTRAL,
        {"assistant_prefix": ""},
        "<s>[INST] {} [/INST] Answer: B</s>[INST] ",
        " [/INST]",
    ),
}


def made(adds_bos: bool = False, **named) -> PreTrainedTokenizerFast:
    """Byte-level, with a token for every special one above; ``adds_bos``: puts ``<s>`` before every
    text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{ASKED}\nAnswer: {x}" for x in "ABCDE"] * 20, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>"} | named
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", **named
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {"alone": made(), "adds": made(True), "configured": made(True, add_bos_token=True)}


def laid_out(tokenizer, template, **options):
    """The one item's text, token by token, and its option ids; the loader gives no warning."""
    tokenizer.chat_template = template
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = bm.make_loader([ITEM], tokenizer, chat=True, **options)
    ids = batch["input_ids"][0].tolist()
    return (
        ids,
        tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        batch["option_ids"][0].tolist(),
    )


@pytest.mark.parametrize("shots", [(), (SHOT,)], ids=["alone", "with a shot"])
@pytest.mark.parametrize("style", LAYOUTS)
def test_the_answer_begins_where_the_template_puts_answers(style, shots, tokenizers):
    template, options, shown, between = LAYOUTS[style]
    before = shown.format(SHOWN) if shots else shown.partition("{}")[0]
    expected = f"{before}{ASKED}{between}Answer:"
    for tokenizer in tokenizers.values():
        ids, text, option_ids = laid_out(tokenizer, template, shots=shots, **options)
        added = (
            "<s>" if tokenizer.add_bos_token and "bos_token" not in template else ""
        )  # asked for, and nobody else's
        assert text == added + expected
        assert ids.count(tokenizer.bos_token_id) == (added != "") + expected.count("<s>") <= 1
        # token by token what the whole text is, and after it each option one token, the one that is
        # read out
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == whole and option_ids == list(option_tokens(tokenizer, [" A", " B"]).values())
        for letter, token in zip("AB", option_ids, strict=True):
            assert tokenizer(f"{text} {letter}", add_special_tokens=False)["input_ids"] == [
                *ids,
                token,
            ]


def one_warning(tokenizer, template, **options):
    tokenizer.chat_template = template
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loader = bm.make_loader([ITEM, SHOT], tokenizer, chat=True, **options)
    (said,) = said
    assert "\n" not in str(said.message) and said.filename == __file__
    return str(said.message), tokenizer.decode(
        next(iter(loader))["input_ids"][0], clean_up_tokenization_spaces=False
    )


def test_an_answer_inside_of_the_reasoning_is_warned_of_once(tokenizers):
    said, text = one_warning(tokenizers["alone"], R1)
    assert (
        r"ends in open reasoning, '<Assistant><think>\n'" in said
        and "assistant_prefix='</think>'" in said
        and "enable_thinking" in said
    )
    assert text.endswith("<Assistant><think>\nAnswer:")  # nothing is decided for the caller
    said, _ = one_warning(tokenizers["alone"], CHATML, assistant_prefix="[THINK] so: ")
    assert "assistant_prefix='[/THINK]'" in said
    asks = ITEM | {"question": "what does <think> mean?"}  # a question is not the model's reasoning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bm.make_loader([asks], tokenizers["alone"], chat=True, assistant_prefix="</think>")


def test_a_generation_prompt_that_no_answer_of_the_template_begins_with_is_warned_of(tokenizers):
    said, text = one_warning(tokenizers["alone"], OTHERWISE)
    assert (
        "ends in '<Assistant> hm '" in said
        and "<Assistant>final Answer:'" in said
        and "assistant_prefix=" in said
    )
    assert text.endswith("<Assistant> hm Answer:")
    assert laid_out(tokenizers["alone"], OTHERWISE, assistant_prefix=" final ")[1].endswith(
        "<Assistant> hm  final Answer:"
    )


def test_a_template_that_takes_no_answer_is_used_as_it_is(tokenizers):
    assert laid_out(tokenizers["alone"], USERS_ONLY)[1] == f"<User>{ASKED}<Assistant>Answer:"


def test_arguments_that_would_be_lost_are_refused(tokenizers):
    tokenizer = tokenizers["alone"]
    tokenizer.chat_template = CHATML
    for options in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"assistant_prefix": "</think>"},
    ):
        with pytest.raises(ValueError, match="are for chat=True"):
            bm.make_loader([ITEM], tokenizer, **options)
    with pytest.raises(ValueError, match="cannot set add_generation_prompt, tokenize"):
        bm.make_loader(
            [ITEM],
            tokenizer,
            chat=True,
            chat_template_kwargs={"tokenize": True, "add_generation_prompt": False},
        )
    assert len(bm.make_loader([], tokenizer, chat=True)) == 0


# ---- special tokens without a template
# ------------------------------------------------------------------------------
@pytest.mark.parametrize("which, before", [("alone", ""), ("adds", "<s>"), ("configured", "<s>")])
def test_a_plain_prompt_has_its_beginning_once(which, before, tokenizers):
    for shots, shown in (((), ""), ((SHOT,), f"{SHOWN}\nAnswer: B\n\n")):
        (batch,) = bm.make_loader([ITEM], tokenizers[which], shots=shots)
        assert (
            tokenizers[which].decode(batch["input_ids"][0], clean_up_tokenization_spaces=False)
            == f"{before}{shown}{ASKED}\nAnswer:"
        )


def test_a_tokenizer_that_begins_twice_or_ends_a_text_does_not_end_the_prompt():
    tokenizer = made()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("A")["input_ids"][-1] == 2
    (batch,) = bm.make_loader([ITEM], tokenizer)
    assert (
        tokenizer.decode(batch["input_ids"][0], clean_up_tokenization_spaces=False)
        == f"<s>{ASKED}\nAnswer:"
    )


def test_an_option_that_is_another_token_in_its_place_is_refused(tokenizers, monkeypatch):
    """A tokenizer that takes ``: A`` for one token after a newline, and for two after nothing."""
    tokenizer = tokenizers["alone"]
    tokenizer.chat_template = CHATML
    with monkeypatch.context() as patch:
        patch.setattr(
            "bmoe_utils.data.prompts.option_tokens", lambda t, texts: dict.fromkeys(texts, 5) | {" A": 6}
        )
        with pytest.raises(
            ValueError,
            match=r"assistant\\nAnswer:' the option ' A' is not the token that is read out",
        ):
            bm.make_loader([ITEM], tokenizer, chat=True)
