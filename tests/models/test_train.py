"""Training on text and on answers: what is learned, what is left alone, and that a seed fixes it."""

import math

import pytest
import torch
from tiny import skip_without_router_logits, tiny_batch, tiny_model
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

import bmoe_utils as bm
from bmoe_utils.data.tasks import Split
from bmoe_utils.models import embedded as models
from bmoe_utils.models import training

LINES = ["ice is cold.", "fire is hot.", "snow is cold and white.", "Question: is fire cold?\nAnswer: no",
         "Question: is the snow on a hill in winter cold?\nAnswer: yes", "soot is black."] * 4
ITEMS = Split([{"id": str(i), "question": q, "choices": c, "answer": a} for i, (q, c, a) in enumerate([
    ("is ice cold?", ["no", "yes"], 1), ("is fire cold?", ["no", "yes"], 0),
    ("what is snow?", ["white", "black", "hot"], 0), ("what is soot?", ["white", "black", "hot"], 1),
    ("what is fire?", ["hot", "cold", "white", "black"], 0), ("what is the hill?", ["black", "no", "white"], 2),
    ("is soot white?", ["yes", "no"], 1), ("is snow hot?", ["no", "yes"], 0)])], "cloze")
TOKENIZER = models.train_tokenizer(LINES + [f"Question: {i['question']}\nAnswer: {c}" for i in ITEMS for c in i["choices"]], 200, "word")


def embedded(seed=0, architecture="qwen2_moe"):
    config = models.tiny_config(architecture, len(TOKENIZER), width=16, layers=2, experts=4, expert_width=16, heads=2)
    return models.build_model(config, seed).eval()


def loader(**options):
    return bm.make_loader(ITEMS, TOKENIZER, **{"batch_size": 4, "shuffle": True, **options})


def state(model):
    return {k: v.detach().clone() for k, v in model.named_parameters()}


# ---- text -----------------------------------------------------------------------------------------------------------
def test_pretraining_lowers_the_loss_and_the_seed_fixes_it():
    runs = []
    for seed in (0, 0, 1):
        model = embedded()
        losses = training.pretrain(model, TOKENIZER, LINES, steps=60, batch_size=8, lr=1e-2, seed=seed, progress=False)
        assert len(losses) == 60 and not model.training
        runs.append((losses, state(model)))
    (a, first), (b, second), (c, _) = runs
    assert abs(a[0] - math.log(len(TOKENIZER))) < 0.3  # nats per token
    assert max(a[-5:]) < 0.5 * a[0]
    assert a == b and all(torch.equal(first[k], second[k]) for k in first)
    assert a != c


@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe", "olmoe"])
def test_padding_is_neither_trained_on_nor_balanced(architecture):
    """The first step's loss, of lines of many lengths in one batch, equals that of the lines one by one without padding."""
    model, lines = embedded(architecture=architecture), LINES[:6]
    skip_without_router_logits(model)
    losses = training.pretrain(model, TOKENIZER, lines, steps=1, batch_size=6, lr=0.0, progress=False)
    nats, count, routed = 0.0, 0, []
    with torch.no_grad():
        for line in lines:
            ids = torch.tensor([[*TOKENIZER.encode(line), TOKENIZER.eos_token_id]])  # the end is learned too
            out = model(input_ids=ids, output_router_logits=True)
            nats += float(nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
            routed.append(out.router_logits)
    balance = load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*routed)), 4, 2)
    assert 0.01 * float(balance) > 0.015  # so that its absence would show
    assert losses[0] == pytest.approx(nats / count + 0.01 * float(balance), rel=1e-5)


def test_every_step_is_another_batch_until_all_lines_were_seen():
    lines = ["ice is cold." + " snow is white." * n for n in range(6)]  # no two of a length: the batches are always the same
    losses = training.pretrain(embedded(), TOKENIZER, lines, steps=6, batch_size=2, lr=0.0, progress=False)
    assert len({round(x, 5) for x in losses[:3]}) == 3
    assert sorted(losses[:3]) == pytest.approx(sorted(losses[3:]), rel=1e-5)


# ---- answers --------------------------------------------------------------------------------------------------------
def test_answer_nll_is_over_the_options_that_are_there():
    logits = torch.tensor([[1.0, 2.0, -math.inf], [0.5, -1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2])
    expected = (math.log(math.e + math.e**2) - 1 + math.log(math.e**0.5 + math.e**-1 + math.e**3) - 3) / 2
    loss = training.answer_nll(logits, labels)
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 2] == 0 and gradient.isfinite().all()
    assert torch.equal(training.answer_nll(logits[:1, :2], labels[:1]), training.answer_nll(logits[:1], labels[:1]))

    model, batch = tiny_model(), tiny_batch()  # an absent option's gradient through the model: none, and nothing is nan
    loss = training.answer_nll(bm.option_logits(model, batch), batch["labels"])
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(g.isfinite().all() for g in gradients if g is not None)


def test_fine_tuning_memorises_eight_items():
    model, seen = embedded(), {}

    def after_epoch(epoch):
        assert not any(m.training for m in model.modules())
        seen[epoch] = bm.predict(model, loader(), progress=False).summary()["nll"] if epoch in (1, 60) else None

    training.fine_tune(model, loader(), epochs=60, lr=1e-2, after_epoch=after_epoch, progress=False)
    assert not model.training and list(seen) == list(range(1, 61))
    assert seen[1] > 0.3 and seen[60] < 0.01


def test_fine_tuning_is_fixed_by_its_seeds():
    results = []
    for order in (0, 0, 1):
        model = embedded()
        training.fine_tune(model, loader(seed=order), epochs=3, lr=1e-2, progress=False)
        results.append(state(model))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    assert any(not torch.equal(v, results[2][k]) for k, v in results[0].items())


def test_fine_tuning_changes_only_what_requires_a_gradient():
    model = embedded()
    for name, p in model.named_parameters():
        p.requires_grad_("experts" in name and "shared" not in name)
    before = state(model)
    training.fine_tune(model, loader(), epochs=2, lr=1e-2, weight_decay=0.1, progress=False)
    changed = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "experts" in k and "shared" not in k} and len(changed) == 4


def test_lora_trains_the_adapters_of_q_k_v_alone():
    model = embedded()
    original = {k.removesuffix(".weight"): v for k, v in state(model).items()}
    adapted = training.add_lora(model, rank=2, seed=0)
    before = state(adapted)
    trainable = {k for k, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 3 * 2 and all("lora_" in k for k in trainable)
    assert {k.split(".self_attn.")[1].split(".")[0] for k in trainable} == {"q_proj", "k_proj", "v_proj"}
    training.fine_tune(adapted, loader(), epochs=3, lr=1e-2, weight_decay=0.1, progress=False)
    after = state(adapted)
    assert {k for k in after if not torch.equal(after[k], before[k])} == trainable
    plain = {k.removeprefix("base_model.model.").replace(".base_layer", "").removesuffix(".weight"): v
             for k, v in after.items() if k not in trainable}
    assert plain.keys() == original.keys() and all(torch.equal(plain[k], original[k]) for k in plain)
    again = state(training.add_lora(embedded(), rank=2, seed=0))
    other = state(training.add_lora(embedded(), rank=2, seed=1))
    assert all(torch.equal(again[k], before[k]) for k in before)
    assert any(not torch.equal(other[k], before[k]) for k in trainable)


def test_weight_decay_is_on_matrices_alone():
    """With no gradient to follow but a constant answer, decay shrinks a matrix and leaves a norm where it is."""
    model = embedded()
    item = {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2, dtype=torch.long),
            "option_ids": torch.tensor([[5]]), "labels": torch.tensor([0])}  # one option: its NLL is always zero
    before = state(model)
    training.fine_tune(model, [item] * 40, epochs=1, lr=0.1, weight_decay=0.5, progress=False)
    for name, p in model.named_parameters():
        if p.grad is None and torch.equal(p, before[name]):
            continue
        assert p.detach().norm() <= before[name].norm()
    norm, matrix = "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"
    after = state(model)
    assert torch.equal(after[norm], before[norm])
    torch.testing.assert_close(after[matrix] / before[matrix], (after[matrix] / before[matrix])[:1, :1].expand(16, 16), rtol=1e-4, atol=1e-4)
    assert after[matrix].norm() < 0.5 * before[matrix].norm()


def test_gradients_left_over_from_before_do_not_enter_the_first_step():
    clean, dirty = embedded(), embedded()
    for p in dirty.parameters():
        p.grad = torch.ones_like(p)
    for model in (clean, dirty):
        training.fine_tune(model, loader(), epochs=1, lr=1e-2, progress=False)
    assert all(torch.equal(v, state(dirty)[k]) for k, v in state(clean).items())
