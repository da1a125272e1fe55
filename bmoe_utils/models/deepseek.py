"""DeepSeek-MoE-16B (arXiv 2401.06066) as a native causal LM; ``model_type: deepseek`` has no class in transformers 5.

Its blocks are the text blocks that transformers has for DeepSeek-OCR-2: multi-head attention, a softmax router that keeps
its K largest probabilities as they are, experts that are always on beside the routed ones, the first layers dense. Only the
language model head, the original config's names and the names of the weights in a checkpoint are added here. The one
difference to the code on the hub: routing probabilities are float32 also in a half-precision model.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2TextModel, DeepseekOcr2TextPreTrainedModel


@strict
class DeepseekConfig(DeepseekOcr2TextConfig):
    """The original ``config.json`` under its own keys. ``ValueError`` for a variant that these blocks do not compute."""

    model_type = "deepseek"
    base_config_key = ""

    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    n_shared_experts: int | None = None

    def __post_init__(self, **kwargs):
        if self.norm_topk_prob or self.scoring_func != "softmax" or not self.n_shared_experts:
            raise ValueError("a 'deepseek' model needs norm_topk_prob=false, scoring_func='softmax' and n_shared_experts >= 1, as "
                             f"DeepSeek-MoE-16B has them, not {self.norm_topk_prob}, {self.scoring_func!r}, {self.n_shared_experts}")
        kwargs.pop("auto_map", None)  # the code it points to does not import here, and is not needed
        if self.mlp_layer_types is None:
            sparse = [i >= self.first_k_dense_replace and i % self.moe_layer_freq == 0 for i in range(self.num_hidden_layers)]
            self.mlp_layer_types = ["sparse" if s else "dense" for s in sparse]
        super().__post_init__(**kwargs)


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """The text model with a language model head."""

    config: DeepseekConfig
    config_class = DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.model = DeepseekOcr2TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for the experts' decorator in the text of this file; it is in the blocks'

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs) -> MoeCausalLMOutputWithPast:
        """As every causal LM of transformers: the text model's arguments, ``labels`` for a loss, ``logits_to_keep``."""
        outputs = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                         hidden_states=outputs.hidden_states, attentions=outputs.attentions,
                                         router_logits=outputs.router_logits)


def register() -> None:
    """Makes transformers' auto classes know the type. A checkpoint has a weight per expert, named as Qwen2-MoE's are: they are
    fused when it is loaded and taken apart when it is saved."""
    AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)
