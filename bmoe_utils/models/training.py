"""Training: the embedded base model on text, and MAP fine-tuning on a task's answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, set_seed

from ..data.tasks import length_batches
from ..precision import Masters
from ..progress import track
from . import offload
from .experts_forward import serve_experts
from .lora_targets import adapters, lora_targets, without_adapter
from .readout import option_logits, to_device


def _optimizer(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int):
    """AdamW with a cosine schedule after 5% warm-up; vectors (norms, biases) are not decayed."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=True)  # the same bits as one by one, sooner where there are many small ones
    return optimizer, get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)


def pretrain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[str],
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Trains on ``lines`` with the language-model loss of every token and the router's balancing loss (the config's
    ``router_aux_loss_coef``). In place; returns the loss of every step (nats per token, balancing included)."""
    set_seed(seed)
    end = tokenizer.eos_token_id
    encoded = [ids + [end] for ids in tokenizer(list(lines), add_special_tokens=False)["input_ids"]]
    optimizer, schedule = _optimizer(model.parameters(), lr, weight_decay, steps)
    losses = []
    serve_experts(model).zero_grad()
    model.train()
    batches = islice(length_batches([len(x) for x in encoded], batch_size, seed), steps)
    for indices in track(batches, "pretraining", progress, total=steps):
        rows = [torch.tensor(encoded[i]) for i in indices]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        batch = to_device({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}, model)
        loss = model(**batch, use_cache=False, output_router_logits=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    seed: int = 0,
    target_modules: str | Sequence[str] | None = None,
) -> nn.Module:
    """LoRA on the attention's q, k and v projections through peft, or what a decoder layer has in
    their place (:mod:`~bmoe_utils.models.lora_targets`); everything else frozen. The matrices of a bf16 or
    fp16 model are float32.

    Args:
        target_modules: the linear layers to adapt instead, as peft takes them: names or their ends,
            a regular expression of the whole name, or ``"all-linear"``.

    A warning names the decoder layers left without an adapter. ``ValueError``, before anything is
    changed, for a model that has adapters already, and where no linear layer is found to adapt.
    """
    if has := adapters(model):
        raise ValueError(f"this {type(model).__name__} already has an adapter "
                         f"({', '.join(map(repr, has))}), which another one would overwrite: merge it "
                         "first (model = model.merge_and_unload()), or take the model without it")
    targets = lora_targets(model) if target_modules is None else target_modules
    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM",
                        target_modules=targets if isinstance(targets, str) else list(targets))
    adapted = get_peft_model(model, config)
    for module in adapted.modules():
        # as peft leaves it where the layer is offloaded
        if isinstance(module, LoraLayer) and module.lora_A["default"].weight.is_meta:
            for matrix in (module.lora_A, module.lora_B):
                matrix.to_empty(device=offload.runs_on(module.get_base_layer()))
            module.reset_lora_parameters("default", init_lora_weights=True)
    if bare := without_adapter(model):
        warnings.warn(f"{len(bare)} decoder layers have no LoRA adapter, since none of their linear "
                      f"layers is one of {targets}: {', '.join(bare)}", stacklevel=2)
    return adapted


def adapted_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that fine-tuning trains, by name: those of the active LoRA adapters if the model
    has any, else all."""
    own = dict(model.named_parameters())
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    if not layers:
        return own
    active = {adapter for m in layers for adapter in m.active_adapters}
    held = [getattr(m, name) for m in layers for name in m.adapter_layer_names]  # adapter -> matrix
    chosen = {id(p) for parts in held for name, p in parts.named_parameters()
              if name.partition(".")[0] in active}
    return {k: v for k, v in own.items() if id(v) in chosen}


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean ``-log softmax(f)_y`` over the item's options: the likelihood of which the Laplace posterior is the curvature."""
    return nn.functional.cross_entropy(logits, labels.to(logits.device))


def fine_tune(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    *,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = answer_nll,
    after_epoch: Callable[[int], None] | None = None,
    progress: bool = True,
) -> None:
    """MAP fine-tuning of every parameter that requires a gradient on the answers' ``loss(logits, labels)``. In place.

    ``loader`` must be re-iterable (it is gone through once an epoch). ``after_epoch(number)`` sees the model in eval mode.
    """
    set_seed(seed)
    masters = Masters({k: p for k, p in model.named_parameters() if p.requires_grad})
    optimizer, schedule = _optimizer(masters.values(), lr, weight_decay, epochs * len(loader))
    model.zero_grad()
    for epoch in track(range(1, epochs + 1), "fine-tuning (epochs)", progress):
        model.train()
        for batch in loader:
            loss(option_logits(model, batch), batch["labels"]).backward()
            masters.step(optimizer)
            schedule.step()
        model.eval()
        if after_epoch is not None:
            after_epoch(epoch)
