"""Which linear layers LoRA adapts: those that read queries, keys and values, or a linear
attention's or state space's input.

They have other names in every family, so they are found by where they are: in the token mixer
(attention, linear attention, state space, short convolution) of each decoder layer. A mixer with
``q_proj``, ``k_proj`` and ``v_proj`` has these adapted, as the protocol says; any other all its
linear layers but the output projection, so for instance ``q_a_proj``, ``q_b_proj``,
``kv_a_proj_with_mqa`` and ``kv_b_proj`` of latent attention, a fused ``qkv_proj``, the ``in_proj``
of a Mamba mixer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

QKV = {"q_proj", "k_proj", "v_proj"}
MIXER = re.compile(r"(.+_)?(attn|attention|mamba|mixer|conv)")
# Output projections; and the projection of a state space's step size, whose weight is read past an
# adapter.
LEFT_OUT = re.compile(r"(o|out|output|o_[ab])_proj|wo|dense|c_proj|dt_proj")


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder layer, in order: the largest of the model's outermost module lists. Empty
    without any."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        return {}
    largest = max(outermost, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return {f"{largest}.{i}": layer for i, layer in lists[largest].named_children()}


def _mixers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a decoder layer that mix tokens. Some call a mixture of experts by the same
    name."""
    for name, module in layer.named_children():
        if MIXER.fullmatch(name) and "experts" not in dict(module.named_children()):
            yield name, module


def _inputs(mixer: nn.Module) -> list[str]:
    """The names, within a token mixer, of the linear layers to adapt: its own, or where it has none
    those of its parts (an indexer or a gate network beside own ones is left alone)."""
    found = [
        name
        for name, m in mixer.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and not LEFT_OUT.fullmatch(name.rpartition(".")[2])
    ]
    own = [name for name in found if "." not in name]
    return sorted(QKV) if QKV <= set(own) else own or found


def lora_targets(model: nn.Module) -> list[str]:
    """The names of the linear layers to adapt, as peft's ``target_modules``: the last part of their
    names (``q_proj``) where that selects no other, else whole. ``ValueError`` where there are
    none."""
    targets = {
        f"{layer}.{mixer}.{name}"
        for layer, module in decoder_layers(model).items()
        for mixer, part in _mixers(module)
        for name in _inputs(part)
    }
    if not targets:
        raise ValueError(
            f"no attention was found in {type(model).__name__}'s decoder layers: name the linear "
            "layers that LoRA shall adapt (target_modules=)"
        )
    last = {name.rpartition(".")[2] for name in targets}
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if alike == targets else targets)


def without_adapter(model: nn.Module) -> list[str]:
    """The names of the decoder layers that no adapter changes."""
    return [
        name
        for name, layer in decoder_layers(model).items()
        if not any(isinstance(m, BaseTunerLayer) for m in layer.modules())
    ]


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that the model has, peft's around it or layers in it, in order."""
    names = dict.fromkeys(model.peft_config if isinstance(model, PeftModel) else ())
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            names |= dict.fromkeys(sorted(module._get_available_adapters()))
    return list(names)
