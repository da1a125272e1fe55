"""Checkpoints that are damaged: one line that names the file and says what to do, before anything
is loaded."""

import json
import shutil
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bmoe_utils as bm
from bmoe_utils.models import embedded

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WEIGHTS, INDEX, SHARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00002-of-00005.safetensors",
)
ADAPTER = "adapter_config.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint in one file, one in shards, one in torch's format, and an adapter of the
    first."""
    folder = tmp_path_factory.mktemp("sound")
    config = embedded.tiny_config(
        "qwen2_moe", 300, width=16, layers=2, experts=4, expert_width=16, heads=2
    )
    config.tie_word_embeddings = False
    model = embedded.build_model(config, 0)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    model.config.save_pretrained(folder / "torch")
    torch.save(model.state_dict(), folder / "torch" / "pytorch_model.bin")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "one"),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(folder / "adapter")
    for name in ("one", "shards", "torch", "adapter"):
        embedded.train_tokenizer(["does ice float on water?", "no, never."], 300).save_pretrained(
            folder / name
        )
        bm.load_model(folder / name)
    return folder


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change(name, **fields):
    def damage(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return damage


def moved(folder):
    """The index looks for a tensor in another shard than it is in."""
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    places["model.norm.weight"] = next(
        v for v in places.values() if v != places["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(index))


def header(**fields):
    """One tensor's entry in the header of the weights, changed."""

    def damage(folder):
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        entries["model.norm.weight"] |= fields
        changed = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", len(changed)) + changed + content[8 + length :]
        )

    return damage


# of which checkpoint, what is done to it, what is said
DAMAGES = {
    "last byte lost": (
        "one",
        cut(WEIGHTS, -1),
        r"model.safetensors is cut short \([\d,]+ of [\d,]+ bytes\): copy or download it again",
    ),
    "half lost": ("one", cut(WEIGHTS, 20_000), "model.safetensors is cut short"),
    "cut in the header": (
        "one",
        cut(WEIGHTS, 100),
        "model.safetensors is cut short or no safetensors file",
    ),
    "empty weights": ("one", cut(WEIGHTS, 0), r"model.safetensors is cut short.*\(0 bytes\)"),
    "a page in place of weights": (
        "one",
        write(WEIGHTS, "<html>404</html>" * 9),
        "model.safetensors is cut short or no safetensors",
    ),
    "weights not fetched": (
        "one",
        write(WEIGHTS, POINTER),
        "model.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "another type": ("one", header(dtype="Q7"), "model.safetensors has a damaged header"),
    "another shape": ("one", header(shape=[17]), "model.safetensors has a damaged header"),
    "no offsets": ("one", header(data_offsets=None), "model.safetensors has a damaged header"),
    "a shard cut": ("shards", cut(SHARD, -5), f"{SHARD} is cut short"),
    "index cut": ("shards", cut(INDEX, 200), "index.json is not valid JSON"),
    "index a list": ("shards", write(INDEX, "[]"), "index.json holds a JSON list, not an object"),
    "index empty": ("shards", write(INDEX, "{}"), "index.json has no weight_map"),
    "index of numbers": (
        "shards",
        change(INDEX, weight_map={"lm_head.weight": 3}),
        "index.json has no weight_map",
    ),
    "index out of the folder": (
        "shards",
        change(INDEX, weight_map={"a": "../a.safetensors"}),
        "index.json has no weight_map",
    ),
    "index of another checkpoint": (
        "shards",
        moved,
        "looks for 'model.norm.weight' in model-.*does not have it",
    ),
    "torch's file cut": (
        "torch",
        cut("pytorch_model.bin", 30_000),
        "pytorch_model.bin is cut short or no file of torch's",
    ),
    "torch's file a text": (
        "torch",
        write("pytorch_model.bin", "hello"),
        "pytorch_model.bin is cut short or no file of torch's",
    ),
    "torch's file not fetched": (
        "torch",
        write("pytorch_model.bin", POINTER),
        "pytorch_model.bin is a Git LFS pointer",
    ),
    "config cut": ("one", cut("config.json", 50), "config.json is not valid JSON"),
    "config null": ("one", write("config.json", "null"), "config.json holds a JSON NoneType"),
    "config deep": (
        "one",
        write("config.json", '{"a":' + "[" * 100_000),
        "config.json is not valid JSON",
    ),
    "config with a huge number": (
        "one",
        write("config.json", '{"a":' + "1" * 5000 + "}"),
        "config.json is not valid JSON",
    ),
    "config of nothing": (
        "one",
        write("config.json", "{}"),
        "no model can be built from the config.json of.*model_type",
    ),
    "config of an unknown type": (
        "one",
        change("config.json", model_type="qwen99"),
        "no model can be built from.*qwen99",
    ),
    "config with a word for a number": (
        "one",
        change("config.json", num_hidden_layers="two"),
        "no model can be built.*num_hidden_layers",
    ),
    "config quantised by a word": (
        "one",
        change("config.json", quantization_config="int4"),
        "quantization_config is 'int4'",
    ),
    "generation config": (
        "one",
        write("generation_config.json", "{"),
        "generation_config.json is not valid JSON",
    ),
    "tokenizer cut": ("one", cut("tokenizer.json", 500), "tokenizer.json is not valid JSON"),
    "tokenizer config": (
        "one",
        write("tokenizer_config.json", "{,}"),
        "tokenizer_config.json is not valid JSON",
    ),
    "adapter's config cut": ("adapter", cut(ADAPTER, 30), f"{ADAPTER} is not valid JSON"),
    "adapter without a base": (
        "adapter",
        change(ADAPTER, base_model_name_or_path=None),
        f"{ADAPTER} names no base model.*put the model",
    ),
    "adapter that names itself": (
        "adapter",
        change(ADAPTER, base_model_name_or_path="."),
        f"{ADAPTER} names a base that is.*itself",
    ),
    "adapter's base gone": (
        "adapter",
        change(ADAPTER, base_model_name_or_path="/no/such/base"),
        "is an adapter of /no/such/base.*neither a folder nor",
    ),
    "adapter's weights cut": (
        "adapter",
        cut("adapter_model.safetensors", -3),
        "adapter_model.safetensors is cut short",
    ),
    "adapter of no type": (
        "adapter",
        change(ADAPTER, peft_type=[]),
        r"peft_type \[\], which cannot be merged",
    ),
}


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, **k: pytest.fail("loading began"))


def said_of(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        bm.load_model(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def damaged(sound, kind, damage, folder):
    shutil.copytree(sound / kind, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_in_one_line_before_anything_is_loaded(
    case, sound, tmp_path, nothing_is_loaded
):
    kind, damage, expected = DAMAGES[case]
    folder = damaged(sound, kind, damage, tmp_path / "damaged")
    said = said_of(folder)
    assert str(folder) in said
    assert pytest.raises(ValueError, match=expected).matches(ValueError(said)), said


def test_adapters_that_name_each_other(sound, tmp_path, nothing_is_loaded):
    for one, other in (("a", "b"), ("b", "a")):
        damaged(
            sound, "adapter", change(ADAPTER, base_model_name_or_path=f"../{other}"), tmp_path / one
        )
    assert "a base that is, in the end, the adapter itself" in said_of(tmp_path / "a")
    damaged(
        sound, "adapter", change(ADAPTER, base_model_name_or_path="../a"), tmp_path / "c"
    )  # leads into the circle
    assert "a base that is, in the end, the adapter itself" in said_of(tmp_path / "c")


# What only loading shows: weights would stay random numbers, or be left out, without a word.
MISFITS = {
    "a layer more": (
        "one",
        change("config.json", num_hidden_layers=3, layer_types=None),
        r"do not fit its config.json: \d+ are not there.*layers\.2",
    ),
    "another width": (
        "one",
        change("config.json", hidden_size=32),
        r"lm_head.weight \(\[300, 16\], not \[300, 32\]\)",
    ),
    "a tokenizer of nothing": (
        "one",
        write("tokenizer.json", "{}"),
        "the tokenizer of .* cannot be read",
    ),
    "another rank": (
        "adapter",
        change(ADAPTER, r=4),
        "adapter .* does not fit its base .*size mismatch",
    ),
    "no such layers": (
        "adapter",
        change(ADAPTER, target_modules=["nope"]),
        "adapter .* does not fit its base .*nope",
    ),
    "layers left out": (
        "adapter",
        change(ADAPTER, target_modules=["q_proj"]),
        "2 of the layers that it saved have no place there .*v_proj",
    ),
    "layers never saved": (
        "adapter",
        change(ADAPTER, target_modules=["q_proj", "v_proj", "o_proj"]),
        "does not fit its base .*missing adapter keys.*o_proj",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_refused(case, sound, tmp_path):
    kind, damage, expected = MISFITS[case]
    said = said_of(damaged(sound, kind, damage, tmp_path / "damaged"))
    assert pytest.raises(ValueError, match=expected).matches(ValueError(said)), said


def test_old_files_of_torch_are_not_taken_for_damaged(sound, tmp_path):
    shutil.copytree(sound / "torch", tmp_path / "old")
    path = tmp_path / "old" / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert torch.equal(
        bm.load_model(tmp_path / "old")[0].lm_head.weight,
        bm.load_model(sound / "one")[0].lm_head.weight,
    )
