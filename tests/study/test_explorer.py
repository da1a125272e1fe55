"""The explorer's numbers are the posteriors' own, and its picture follows its controls."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_routers import stir
from tiny import tiny_model

from bmoe_utils.data.tasks import Split, make_loader
from bmoe_utils.experts.laplace import ExpertLaplace
from bmoe_utils.joint.posterior import JointPosterior
from bmoe_utils.models.embedded import train_tokenizer
from bmoe_utils.models.files import model_fingerprint
from bmoe_utils.models.readout import option_logits
from bmoe_utils.routers.attach import attach_routers
from bmoe_utils.study import explorer

QUESTIONS = Split([{"id": "a", "question": "where does the duck sleep?", "choices": ["pond", "barn", "nest"], "answer": 1, "p_star": [0.2, 0.7, 0.1]},
                   {"id": "b", "question": "what does the cow eat?", "choices": ["grass", "nest"], "answer": 0, "p_star": [0.9, 0.1]}], "cloze")
S = 4


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"{item['question']} Question: Answer: {' '.join(item['choices'])}" for item in QUESTIONS]
    return train_tokenizer([f" {text}" for text in words] + words, 50, "word")


@pytest.fixture
def tool(tokenizer):
    model = tiny_model()

    def loader(items):
        return make_loader(items, tokenizer, batch_size=1)

    la = ExpertLaplace(model, prior_precision=2.0).fit(loader(QUESTIONS), progress=False)
    routers = stir(attach_routers(model, "mfvr", inference="whole-model", num_samples=S, seed=3))
    tool = explorer.Explorer(JointPosterior(la, routers), loader, {"test": QUESTIONS, "far": QUESTIONS.subset(1)}, tokenizer=tokenizer)
    yield tool
    plt.close("all")
    routers.detach()


@pytest.mark.parametrize("factor", [explorer.FACTORS[0], 1.0, explorer.FACTORS[8]])
@pytest.mark.parametrize("routings", [1, 3, S])
def test_answers_are_the_joint_posteriors_at_that_setting(tool, factor, routings):
    item = QUESTIONS[0]
    said = tool.answer(item, factor, routings)
    joint, la = tool.joint, tool.joint.laplace
    batch = next(iter(tool.loader(QUESTIONS.subset(1))))
    la.prior_precision, joint.routers.num_samples = factor * 2.0, routings
    try:
        expected, parts = joint(batch), joint.decompose(batch)
    finally:
        la.prior_precision, joint.routers.num_samples = 2.0, S
    # 1e-7: the square root of a covariance has that of its rounding, in directions without variance
    assert said.probs == pytest.approx(expected[0].numpy(), abs=1e-7)
    for name in ("total", "aleatoric", "expert", "routing"):
        assert said.parts[name] == pytest.approx(float(getattr(parts, name)[0]), abs=1e-7)
    assert said.parts["total"] == pytest.approx(sum(said.parts[n] for n in ("aleatoric", "expert", "routing")), abs=1e-12)


def test_the_map_models_answer_is_without_routers_and_all_is_left_as_it_was(tool):
    routers, item = tool.joint.routers, QUESTIONS[0]
    before, batch = model_fingerprint(routers.model), next(iter(tool.loader(QUESTIONS.subset(1))))
    routed = routers(batch)
    said = tool.answer(item)
    assert torch.equal(routers(batch), routed) and model_fingerprint(routers.model) == before
    routers.detach()
    with torch.no_grad():
        plain = option_logits(routers.model, batch).softmax(-1)[0].numpy()
    assert said.map_probs == pytest.approx(plain, abs=1e-14) and np.abs(said.probs - plain).max() > 1e-3


def test_sliders_need_no_model(tool, monkeypatch):
    tool.answer(QUESTIONS[0])
    monkeypatch.setattr(tool.joint, "predictive_logits", lambda *_: pytest.fail("a slider ran the model"))
    tool.answer(QUESTIONS[0], explorer.FACTORS[2], 2)


def test_the_experts_part_grows_as_the_prior_widens(tool):
    parts = [tool.answer(QUESTIONS[0], factor).parts["expert"] for factor in tool.factors]
    assert parts == sorted(parts, reverse=True) and parts[0] > 3 * parts[-1]
    assert tool.answer(QUESTIONS[0], routings=1).parts["routing"] == 0 < tool.answer(QUESTIONS[0], routings=S).parts["routing"]


def drawn(tool, item, **setting):
    fig = tool.panel(item, **setting)
    return [b.get_width() for b in fig.axes[0].patches], [b.get_width() for b in fig.axes[1].patches]


def test_panel_shows_the_answer(tool):
    bars, strip = drawn(tool, QUESTIONS[0], factor=explorer.FACTORS[3], routings=2)
    said = tool.answer(QUESTIONS[0], explorer.FACTORS[3], 2)
    assert bars == pytest.approx([*said.probs, *said.map_probs])
    assert strip == pytest.approx([said.parts[n] for n in ("aleatoric", "expert", "routing")])


def test_sweep_shows_every_setting(tool):
    fig = tool.sweep(QUESTIONS[0])
    assert fig.axes[0].lines[1].get_ydata() == pytest.approx([tool.answer(QUESTIONS[0], f).probs[1] for f in tool.factors])
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["pond", "barn (labelled)", "nest"]


def test_moving_a_control_changes_the_picture_to_that_settings(tool, monkeypatch):
    shown, panel = [], tool.panel
    monkeypatch.setattr(tool, "panel", lambda *args: shown.append(args) or panel(*args))
    box = tool.widget()
    c, pictures = box.controls, [bytes(box.picture.value)]
    assert pictures[0].startswith(b"\x89PNG") and shown[-1] == (QUESTIONS[0], 1.0, S)
    for name, value, expected in (("factor", tool.factors[0], (QUESTIONS[0], tool.factors[0], S)), ("routings", 1, (QUESTIONS[0], tool.factors[0], 1)),
                                  ("index", 1, (QUESTIONS[1], tool.factors[0], 1))):
        c[name].value = value
        pictures.append(bytes(box.picture.value))
        assert shown[-1] == expected
    assert len(set(pictures)) == len(pictures)
    assert "grass" in box.note.value or "nest" in box.note.value
    c["split"].value = "far"  # has one question only
    assert c["index"].value == 0 and shown[-1][0] == QUESTIONS[0]


def test_a_typed_question(tool):
    box = tool.widget()
    c, before = box.controls, box.picture.value
    c["question"].value = "where does the zebra sleep?"
    assert "give 2 to 26" in box.note.value and box.picture.value == before  # no options yet: the picture stays
    c["choices"].value = "pond | barn|nest"
    assert box.picture.value != before and "unknown to the model: zebra" in box.note.value
    before = box.picture.value
    c["choices"].value = "pond | <gate>"
    assert "&lt;gate>" in box.note.value and "one token of its own" in box.note.value and box.picture.value == before
    c["question"].value = ""  # back to the task's own
    assert box.note.value.split(":")[0] in QUESTIONS[0]["choices"]


def test_typed_questions_are_checked(tool):
    assert tool.typed(" where? ", ["pond", "barn"]) == {"id": "typed", "question": "where?", "choices": ["pond", "barn"], "answer": None}
    for question, choices, why in (("", "a|b", "no question"), ("where?", "pond", "1 options"), ("where?", "pond|pond", "share a token")):
        with pytest.raises(ValueError, match=why):
            tool.typed(question, choices)
    with pytest.raises(ValueError, match="no question 7 in 'test'"):
        tool.item("test", 7)
    with pytest.raises(ValueError, match="factor 0.5 is not one of"):
        tool.answer(QUESTIONS[0], 0.5)
    with pytest.raises(ValueError, match="between 1 and 4"):
        tool.answer(QUESTIONS[0], routings=5)


def test_a_batch_run_shows_nothing(tool, monkeypatch):
    monkeypatch.setenv("BMOE_BATCH", "1")
    assert tool.show() is None
    monkeypatch.setenv("BMOE_BATCH", "0")
    assert tool.show("far").controls["split"].value == "far"
