"""Folders and hub repositories of peft adapters: the merged model against the unmerged one, whose
tokenizer it comes with, and where its base is looked for."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_batch
from transformers import AutoModelForCausalLM

import bmoe_utils as bm
from bmoe_utils.models import embedded

TEXTS = [
    "does ice float on water?",
    "is the sun a star?",
    "Question: can a polar bear swim?\nAnswer: yes",
    "no, never.",
]
ROWS = 300
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tokenizer(*added):
    made = embedded.train_tokenizer(TEXTS, ROWS)
    made.add_tokens(list(added))
    return made


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


def write_base(folder, *, tied=False, rows=ROWS, dtype=torch.float32):
    config = embedded.tiny_config(
        "qwen2_moe", rows, width=16, layers=2, experts=4, expert_width=16, heads=2
    )
    config.tie_word_embeddings = tied
    embedded.build_model(config, 0).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapted(base, **options):
    """A model with adapters whose every number is random, so that none could be left out unseen."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows := options.pop("rows", None):
        model.resize_token_embeddings(rows)
    model = get_peft_model(
        model,
        LoraConfig(
            **{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
        ),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0, 0.3)
    return model.eval()


def batch_of(rows):
    """Every prompt and every item's options have the last token, which a smaller embedding would
    not have."""
    batch = tiny_batch()
    batch["input_ids"][:, -1] = batch["option_ids"][:, 0] = rows - 1
    return batch


def read_out(model, rows):
    with torch.no_grad():
        return bm.option_logits(model, batch_of(rows))


EMBEDDINGS = {
    "of the base": ({}, ROWS),
    "of the base, with experts": (
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        },
        ROWS,
    ),
    "adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, ROWS),
    "more, trained whole": (
        {"rows": ROWS + 2, "modules_to_save": ["embed_tokens", "lm_head"]},
        ROWS + 2,
    ),
    "more, saved along": (
        {"rows": ROWS + 2},
        ROWS + 2,
    ),  # peft saves embeddings whose size has changed
    "less, saved along": ({"rows": ROWS - 20}, ROWS - 20),  # a padded base cut to its tokenizer
}


@pytest.mark.parametrize(
    "case, tied, dtype",
    [
        *((case, tied, torch.float32) for case in EMBEDDINGS for tied in (False, True)),
        *((case, False, torch.bfloat16) for case in ("of the base", "more, trained whole")),
    ],
)
def test_the_merged_model_is_the_unmerged_one(case, tied, dtype, tmp_path):
    options, rows = EMBEDDINGS[case]
    model = adapted(write_base(tmp_path / "base", tied=tied, dtype=dtype), **options)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer(*(f"<x{i}>" for i in range(rows - ROWS))).save_pretrained(tmp_path / "adapter")
    expected = read_out(model, rows)
    merged, _ = bm.load_model(tmp_path / "adapter")
    assert {p.dtype for p in merged.parameters()} == {dtype} and not merged.training
    assert (
        merged.get_input_embeddings().weight.shape[0]
        == rows
        == merged.get_output_embeddings().weight.shape[0]
    )
    # a sum of two products in place of one product with the sum: float32's rounding, or bfloat16's
    # at every layer
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(read_out(merged, rows), expected, rtol=rounding, atol=rounding)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    assert torch.equal(
        read_out(bm.load_model(tmp_path / "merged")[0], rows), read_out(merged, rows)
    )


def test_a_tokenizer_that_grew_without_its_embeddings_has_rows_for_every_token(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "adapter")
    tokenizer("<x0>", "<x1>").save_pretrained(tmp_path / "adapter")
    (one, own), (two, _) = (bm.load_model(tmp_path / "adapter") for _ in range(2))
    assert len(own) == ROWS + 2 == one.get_input_embeddings().weight.shape[0]
    assert torch.equal(read_out(one, ROWS + 2), read_out(two, ROWS + 2))


def test_the_adapters_own_tokenizer_and_template_come_with_it(base, tmp_path):
    folder = tmp_path / "adapter"
    adapted(base).save_pretrained(folder)
    assert bm.load_model(folder)[1].chat_template is None
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert (
        bm.load_model(folder)[1].chat_template == "{{ messages[0].content }}!"
    )  # on the base's tokenizer
    own = tokenizer("<x0>")
    own.chat_template, own.padding_side, own.pad_token = "{{ messages[0].content }}?", "right", None
    own.save_pretrained(folder)
    said = bm.load_model(folder)[1]
    assert said.chat_template == "{{ messages[0].content }}?" and said.encode("<x0>") == [ROWS]
    assert said.padding_side == "left" and said.pad_token == said.eos_token


def test_a_config_beside_the_adapter_does_not_make_it_a_model(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copy(base / "config.json", tmp_path / "adapter")
    torch.testing.assert_close(
        read_out(bm.load_model(tmp_path / "adapter")[0], ROWS), read_out(model, ROWS)
    )


def test_an_adapter_of_an_adapter(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "one")
    model, own = bm.load_model(tmp_path / "one")
    two = get_peft_model(
        model,
        LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    two.save_pretrained(tmp_path / "two")
    torch.testing.assert_close(
        read_out(bm.load_model(tmp_path / "two")[0], ROWS), read_out(two, ROWS)
    )


def test_an_offloaded_base(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    for where in ({"": "cpu"}, places | {"model.layers.0": "disk"}):
        merged, _ = bm.load_model(
            tmp_path / "adapter", device_map=where, offload_folder=tmp_path / "off"
        )
        torch.testing.assert_close(read_out(merged, ROWS), read_out(model, ROWS))


# ---- where the base is
# ----------------------------------------------------------------------------------------------
def rename_base(folder, name):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


def test_a_relative_base_counts_from_the_adapter_first(base, tmp_path, monkeypatch):
    model = adapted(base)
    folder, elsewhere = tmp_path / "runs" / "adapter", tmp_path / "elsewhere"
    model.save_pretrained(folder)
    shutil.move(base, tmp_path / "runs" / "base")
    rename_base(folder, "../base")
    elsewhere.mkdir()
    other = write_base(tmp_path / "other", rows=ROWS + 8)  # to be told apart
    monkeypatch.chdir(elsewhere)
    shutil.copytree(other, tmp_path / "base")  # what ../base is from the working directory
    torch.testing.assert_close(read_out(bm.load_model(folder)[0], ROWS), read_out(model, ROWS))
    shutil.move(tmp_path / "runs" / "base", elsewhere / "mine")
    rename_base(folder, "mine")  # only from the working directory
    description = json.loads((folder / "adapter_config.json").read_text()) | {"revision": "main"}
    (folder / "adapter_config.json").write_text(json.dumps(description))  # of the hub's base, once
    torch.testing.assert_close(read_out(bm.load_model(folder)[0], ROWS), read_out(model, ROWS))


def to_cache(folder, cache, name, commit=COMMIT):
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    return repo / "snapshots" / commit


def test_an_adapter_on_the_hub_is_found_in_its_cache_with_its_base(base, tmp_path, monkeypatch):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer("<x0>").save_pretrained(tmp_path / "adapter")
    rename_base(tmp_path / "adapter", "some/moe")
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = to_cache(tmp_path / "adapter", cache, "some/lora")
    with pytest.raises(
        FileNotFoundError, match=r"is an adapter of some/moe.*hf download some/moe"
    ) as error:
        bm.load_model("some/lora")
    assert "\n" not in str(error.value)
    to_cache(base, cache, "some/moe", commit=COMMIT[::-1])
    for revision in (None, COMMIT):
        merged, own = bm.load_model("some/lora", revision=revision)
        assert own.encode("<x0>") == [ROWS] and merged.config._commit_hash == COMMIT
        torch.testing.assert_close(read_out(merged, ROWS), read_out(model, ROWS))
    (snapshot / "adapter_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="has not adapter_model.safetensors.*hf download some/lora"
    ):
        bm.load_model("some/lora")


def test_an_adapter_on_the_hub_that_is_not_in_the_cache_is_fetched(base, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub

    model, folder = adapted(base), tmp_path / "adapter"
    model.save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = [SimpleNamespace(rfilename=p.name) for p in folder.iterdir()]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files)
    )
    real = huggingface_hub.snapshot_download
    download = lambda *a, local_files_only=False, **k: (
        real(*a, local_files_only=True, **k) if local_files_only else str(folder)
    )  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    torch.testing.assert_close(read_out(bm.load_model("some/lora")[0], ROWS), read_out(model, ROWS))


def test_an_adapter_that_cannot_be_merged_is_refused_before_its_base_is_loaded(
    base, tmp_path, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(
        model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loading began")
    )
    with pytest.raises(ValueError, match="peft_type 'PREFIX_TUNING', which cannot be merged"):
        bm.load_model(tmp_path / "adapter")


def test_adapters_of_single_experts_are_merged_or_refused_but_never_dropped(base, tmp_path):
    """As saved before experts were fused: peft takes them in some architectures, drops them in
    others."""
    folder = tmp_path / "adapter"
    adapted(base, target_modules=["down_proj"]).save_pretrained(folder)  # the shared expert's
    path = folder / "adapter_model.safetensors"
    saved, one = load_file(path), "base_model.model.model.layers.0.mlp.experts.1.down_proj"
    experts = {f"{one}.lora_A.weight": torch.ones(2, 16), f"{one}.lora_B.weight": torch.ones(16, 2)}
    save_file(saved | experts, path)
    said = r"1 of the layers that it saved .*experts\.1\.down_proj"
    with pytest.raises(ValueError, match=said):
        bm.load_model(folder)
