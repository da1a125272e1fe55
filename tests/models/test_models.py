"""Loading, building and reading out models: against the plain forward, with weights that leave nothing near zero."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny import ARCHITECTURES, VOCAB, single_items, skip_without_router_logits, tiny_batch, tiny_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bmoe_utils as bm
from bmoe_utils.data.world import load_world
from bmoe_utils.models import embedded
from bmoe_utils.models.layers import expert_layers

EXACT = dict(rtol=1e-12, atol=1e-12)
# Norms and router probabilities are float32 inside transformers, so other shapes (batch, padding) round otherwise.
ACROSS_SHAPES = dict(rtol=1e-5, atol=1e-6)
TEXTS = ["does ice float on water?", "is the sun a star?", "Question: can a polar bear swim?\nAnswer: yes", "no, never."]

# What changes the head's numbers: a scale behind it, the embedding as its weight, a bias.
HEADS = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "scaled": ("granitemoe", {"logits_scaling": 4.0}),
    "tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "bias": ("mixtral", {}),
}


def with_head(case):
    architecture, options = HEADS[case]
    model = tiny_model(architecture, **options)
    if case == "bias":
        model.lm_head = nn.Linear(16, VOCAB, dtype=torch.float64)
    return model


def lora(model, *targets, seed=0):
    """peft's LoRA with a nonzero B, so that ignoring it would show."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).eval()


def by_hand(model, batch):
    """``f [B, C]``: every item alone and without padding through the stock forward, its options picked one by one."""
    f = torch.full(batch["option_ids"].shape, -torch.inf, dtype=torch.float64)
    for i, item in enumerate(single_items(batch)):
        logits = model(input_ids=item["input_ids"]).logits
        assert logits.shape[-1] == VOCAB
        for c, token in enumerate(item["option_ids"][0].tolist()):
            if token != -1:
                f[i, c] = logits[0, -1, token]
    return f


# ---- the read-out ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", HEADS)
def test_option_logits_are_the_vocabulary_logits_of_the_options(case):
    model, batch = with_head(case), tiny_batch()
    with torch.no_grad():
        expected = by_hand(model, batch)
        assert (expected == -torch.inf).sum() == 1 and expected[1, 3] == -torch.inf
        alone = [bm.option_logits(model, item)[0] for item in single_items(batch)]
        torch.testing.assert_close(torch.stack(alone), expected, **EXACT)
        together = bm.option_logits(model, batch)
    torch.testing.assert_close(together, expected, **ACROSS_SHAPES)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "k_proj", "v_proj"], ["lm_head", "q_proj"]])
def test_option_logits_under_lora(targets):
    batch = tiny_batch()
    with torch.no_grad():
        before = by_hand(tiny_model(), batch)
        model = lora(tiny_model(), *targets)
        expected = by_hand(model, batch)
        assert not torch.allclose(expected, before, atol=1e-2)
        alone = [bm.option_logits(model, item)[0] for item in single_items(batch)]
        torch.testing.assert_close(torch.stack(alone), expected, **EXACT)
        torch.testing.assert_close(bm.option_logits(model, batch), expected, **ACROSS_SHAPES)


def test_scaling_after_the_head_is_applied_once():
    batch = tiny_batch()
    plain, scaled = (bm.option_logits(tiny_model("granitemoe", logits_scaling=s), batch) for s in (1.0, 4.0))
    torch.testing.assert_close(plain, scaled * 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_option_logits_do_not_depend_on_left_padding_or_what_is_in_it(architecture):
    model, batch = tiny_model(architecture), tiny_batch()
    wide = {k: nn.functional.pad(v, (6, 0)) if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
    other = wide | {"input_ids": wide["input_ids"].masked_fill(wide["attention_mask"] == 0, 7)}
    with torch.no_grad():
        f = bm.option_logits(model, batch)
        for padded in (wide, other):
            torch.testing.assert_close(bm.option_logits(model, padded), f, **ACROSS_SHAPES)


def test_positions_count_from_the_first_real_token():
    """Rotary positions are relative and would hide a shift; models with absolute ones would not."""
    model, batch, seen = tiny_model(), tiny_batch(), []
    with model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True):
        bm.option_logits(model, batch)
    real = batch["attention_mask"].bool()
    assert not real.all()
    assert [row[mask].tolist() for row, mask in zip(seen[0], real)] == [list(range(n)) for n in real.sum(1).tolist()]


def test_gradients_equal_those_of_the_vocabulary_logits():
    """To the body, the head and the tied embedding alike; and none through an option that is not there."""
    for options in ({}, {"tie_word_embeddings": True}):
        model = tiny_model(**options)
        item = next(single_items(tiny_batch()))
        item["option_ids"] = torch.tensor([[5, 9, -1]])
        parameters = list(model.parameters())
        f = bm.option_logits(model, item)
        mine = torch.autograd.grad(f[0, 0] - 2 * f[0, 1], parameters, allow_unused=True)
        logits = model(input_ids=item["input_ids"]).logits[0, -1]
        expected = torch.autograd.grad(logits[5] - 2 * logits[9], parameters, allow_unused=True)
        for (name, _), a, b in zip(model.named_parameters(), mine, expected, strict=True):
            assert (a is None) == (b is None), name
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_unusable_batches_are_refused():
    model, batch = tiny_model(), tiny_batch()
    right = batch | {k: batch[k].flip(1) for k in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="left"):
        bm.option_logits(model, right)
    optionless = batch["option_ids"].clone()
    optionless[2] = -1
    with pytest.raises(ValueError, match="no option"):
        bm.option_logits(model, batch | {"option_ids": optionless})


def test_the_head_is_as_it_was_also_after_a_failure(monkeypatch):
    model, batch = tiny_model(), tiny_batch()
    ids = batch["input_ids"][:1]
    before, attributes = model(input_ids=ids).logits, sorted(vars(model.lm_head))
    bm.option_logits(model, batch)
    assert torch.equal(model(input_ids=ids).logits, before)

    head_was_replaced = []

    def fail(*_):
        head_was_replaced.append(sorted(vars(model.lm_head)) != attributes)
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", fail)
        with pytest.raises(MemoryError):
            bm.option_logits(model, batch)
    assert head_was_replaced == [True]  # or this test would show nothing
    assert sorted(vars(model.lm_head)) == attributes
    assert torch.equal(model(input_ids=ids).logits, before)


# ---- checkpoints ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe", "olmoe"])
def test_a_saved_checkpoint_loads_to_identical_logits(architecture, tmp_path):
    tokenizer = embedded.train_tokenizer(TEXTS, 400)
    tokenizer.padding_side = "right"  # what many hub tokenizers say
    model = embedded.build_model(embedded.tiny_config(architecture, len(tokenizer), width=16, layers=2, experts=4,
                                                  expert_width=8), seed=3).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer2 = bm.load_model(tmp_path)
    assert not loaded.training and tokenizer2.padding_side == "left"
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    batch = tiny_batch()
    assert torch.equal(bm.option_logits(loaded, batch), bm.option_logits(model, batch))
    if architecture == "qwen2_moe":  # the hub's layout has a tensor per expert
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert any("experts.0." in name for name in file.keys())
    double, _ = bm.load_model(str(tmp_path), dtype=torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


def test_a_tokenizer_without_a_padding_token_pads_with_the_end(tmp_path):
    tokenizer = embedded.train_tokenizer(TEXTS, 400)
    embedded.build_model(embedded.tiny_config("olmoe", len(tokenizer), width=16, layers=1), 0).save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert bm.load_model(tmp_path)[1].pad_token_id == tokenizer.eos_token_id


def test_what_cannot_be_loaded_is_a_clear_error(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        bm.load_model(tmp_path / "nowhere")
    with pytest.raises(OSError):  # the hub is offline in tests
        bm.load_model("no-such-owner/nowhere")
    dense = LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    embedded.train_tokenizer(TEXTS, 400).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="LlamaForCausalLM.*mixture-of-experts"):
        bm.load_model(tmp_path / "dense")


# ---- tokenizers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bpe", "word"])
def test_tokenizer_round_trip_determinism_and_files(kind, tmp_path):
    tokenizer = embedded.train_tokenizer(TEXTS, 400, kind)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = embedded.train_tokenizer(iter(TEXTS), 400, kind)
    assert json.loads(again.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert [loaded.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    for t in (tokenizer, loaded):
        assert (t.pad_token_id, t.eos_token_id, t.padding_side) == (0, 1, "left")  # the ids that tiny_config names
        padded = t(["no, never.", TEXTS[2]], padding=True)
        gap = len(padded["input_ids"][1]) - len(t.encode("no, never."))
        assert gap > 0
        assert padded["input_ids"][0] == [0] * gap + t.encode("no, never.")
        assert padded["attention_mask"][0] == [0] * gap + [1] * (len(padded["input_ids"][0]) - gap)


def test_word_tokenizer_has_a_token_a_word_and_one_for_the_unknown():
    tokenizer = embedded.train_tokenizer(TEXTS, 400, "word")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("is the sun a star?")) == ["is", " the", " sun", " a", " star", "?"]
    ids = tokenizer.encode("is the moon a star?")
    assert ids[2] == tokenizer.unk_token_id and ids.count(tokenizer.unk_token_id) == 1
    words = {w for t in TEXTS for w in tokenizer.tokenize(t)}
    small = embedded.train_tokenizer(["b b b a a c"], 5, "word")  # the three special ones and the most frequent
    assert len(tokenizer) == 3 + len(words) and len(small) == 5
    assert small.unk_token_id in small.encode(" c") and small.unk_token_id not in small.encode(" b")


def test_bpe_tokenizer_knows_any_text():
    tokenizer = embedded.train_tokenizer(TEXTS, 300)
    for text in ("größer als 3 µm — 北京 🙂", "tabs\tand\n\nlines", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.unk_token is None and len(tokenizer) == 300


def test_every_option_of_the_world_is_one_token_of_a_word_tokenizer_that_saw_it():
    world = load_world()
    values = sorted({v for r in world.relations for v in world.vocabulary(r)})
    tokenizer = embedded.train_tokenizer([f"it is {v}." for v in values], 4096, "word")
    ids = [tokenizer.encode(f" {v}", add_special_tokens=False) for v in values]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(values)
    assert [tokenizer.unk_token_id] not in ids


def test_unknown_tokenizer_kind():
    with pytest.raises(ValueError, match="'char'.*'bpe' or 'word'"):
        embedded.train_tokenizer(TEXTS, 400, "char")


# ---- embedded models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe", "olmoe"])
def test_embedded_models_are_what_their_config_says(architecture):
    config = embedded.tiny_config(architecture, 90, width=24, layers=2, experts=6, top_k=3, expert_width=12, heads=2)
    model = embedded.build_model(config, 0)
    modules = list(expert_layers(model).values())
    assert len(modules) == 2 and {tuple(m.down_proj.shape) for m in modules} == {(6, 24, 12)}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any("shared_expert" in n for n, _ in model.named_modules()) == (architecture == "qwen2_moe")
    skip_without_router_logits(model)
    ids = torch.randint(2, 90, (2, 5))
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == 2 and out.router_logits[0].shape[-1] == 6
    torch.testing.assert_close(out.loss - nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
                               0.01 * out.aux_loss, rtol=1e-3, atol=1e-6)  # the balancing loss is on
    slots = []
    hook = modules[0].register_forward_pre_hook(lambda _, args, kwargs: slots.append((args, kwargs)), with_kwargs=True)
    model(input_ids=ids)
    hook.remove()
    tensors = [*slots[0][0], *slots[0][1].values()]
    assert any(t.shape == (10, 3) and not t.is_floating_point() for t in tensors)  # top 3 of every token


def test_the_seed_fixes_every_weight():
    config = embedded.tiny_config("qwen2_moe", 90, width=16, layers=1)
    a, b, c = (embedded.build_model(config, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    random = [k for k in a if "norm" not in k and a[k].std() > 0]
    assert len(random) > 5 and all(not torch.equal(a[k], c[k]) for k in random)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="'llama'.*qwen2_moe.*granitemoe.*olmoe"):
        embedded.tiny_config("llama", 90)
