"""What Bayesian routers cost, by counting: parameters and FLOPs per token from shapes alone, without a model.

Conventions. A FLOP count is that of the forward pass for one token, 2 a multiply-add, matrix products alone: softmax, norms,
activations and random numbers are left out (they cost time all the same; ``tests/benchmarks/router_latency.py`` measures
that). Attention scores are those of a token with ``context`` others, nothing deducted for causality. The vocabulary head is
left out by default, as this study's read-out has a few rows of it only; shares of the model are the larger for both.

    d hidden width    E experts    K experts per token    t trunk width    S samples, drawn in ceil(S / 2) antithetic pairs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .families import FAMILIES
from .maths import SAMPLE_FREE_NODES

# The models of the papers, in the field names of their published config.json.
SHAPES = {
    "granite-3.x-3b-a800m": {
        "model_type": "granitemoe", "hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "num_local_experts": 40, "num_experts_per_tok": 8, "intermediate_size": 512, "vocab_size": 49155, "tie_word_embeddings": True,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "deepseek-moe-16b": {
        "model_type": "deepseek", "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "intermediate_size": 10944, "vocab_size": 102400, "tie_word_embeddings": False,
    },
}
# The rows of a table: label, method, samples (None: sample-free), options.
WAYS = (
    ("temperature", "temperature", 35, {}),
    ("VTSR", "vtsr", 35, {}),
    ("MFVR", "mfvr", 35, {}),
    ("MFVR, sample-free", "mfvr", None, {}),
    ("FCVR", "fcvr", 35, {}),
    ("FCVR, sample-free", "fcvr", None, {}),
    ("FCVR, rank 4", "fcvr", 35, {"rank": 4}),
    ("Laplace", "laplace", 35, {}),
    ("Laplace, curvature of rank 64", "laplace", 35, {"curvature_rank": 64}),
    ("SWAG", "swag", 35, {}),
    ("SWAG, sample-free", "swag", None, {}),
    ("ensemble of 5", "ensemble", 35, {}),
    ("MC dropout", "mcdropout", 35, {}),
)


# ---- the model ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """What the counts need to know of a model; :meth:`of` reads it from a config."""

    kind: str
    width: int
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int  # of all shared experts together; 0: none
    dense_width: int  # of the layers without experts
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: str | Mapping | object) -> Shape:
        """From a name of ``SHAPES``, a dict with a config.json's field names, or a transformers config.

        ``ValueError`` for an architecture other than granitemoe, qwen2_moe, olmoe, mixtral and deepseek.
        """
        if isinstance(config, Shape):
            return config
        if isinstance(config, str):
            if config not in SHAPES:
                raise ValueError(f"{config!r} is not one of {', '.join(SHAPES)}; give its config instead")
            config = SHAPES[config]
        c = config if isinstance(config, Mapping) else config.to_dict()
        layers, kind = c["num_hidden_layers"], c["model_type"]
        own = c["intermediate_size"]
        match kind:
            case "granitemoe" | "mixtral":
                experts, expert_width, shared, sparse = c["num_local_experts"], own, 0, layers
            case "olmoe":
                experts, expert_width, shared, sparse = c["num_experts"], own, 0, layers
            case "qwen2_moe":
                experts, expert_width, shared = c["num_experts"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
                step, dense = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
                sparse = sum(i not in dense and (i + 1) % step == 0 for i in range(layers))
            case "deepseek":
                experts, expert_width = c["n_routed_experts"], c["moe_intermediate_size"]
                shared, sparse = c["n_shared_experts"] * expert_width, layers - c["first_k_dense_replace"]
            case _:
                raise ValueError(f"model_type {kind!r} cannot be counted; known: granitemoe, qwen2_moe, olmoe, mixtral, deepseek")
        heads = c["num_attention_heads"]
        return cls(kind, c["hidden_size"], layers, sparse, experts, c["num_experts_per_tok"], expert_width, shared, own, heads,
                   c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads, c["vocab_size"],
                   bool(c.get("tie_word_embeddings")))

    def some(self, layers: int | None) -> int:
        """How many of the MoE layers; None: all of them."""
        if layers is not None and not 1 <= layers <= self.moe_layers:
            raise ValueError(f"layers={layers}: the model has {self.moe_layers} layers with experts")
        return self.moe_layers if layers is None else layers

    @property
    def _attention(self) -> int:
        """Weights of one layer's four projections."""
        return 2 * self.width * self.head_width * (self.heads + self.kv_heads)

    @property
    def _shared(self) -> int:
        """Weights of one layer's shared experts, with Qwen2-MoE's gate of them."""
        return 3 * self.width * self.shared_width + self.width * (self.kind == "qwen2_moe")


def model_flops(config, *, context: int = 128, head: bool = False) -> int:
    """Forward FLOPs per token of the model as it comes; ``head``: with the vocabulary's logits."""
    s = Shape.of(config)
    per_layer = s._attention + 2 * s.heads * s.head_width * context
    sparse = s.width * s.experts + 3 * s.width * s.expert_width * s.top_k + s._shared
    dense = 3 * s.width * s.dense_width
    return 2 * (s.layers * per_layer + s.moe_layers * sparse + (s.layers - s.moe_layers) * dense + head * s.width * s.vocabulary)


def model_parameters(config) -> int:
    """All of the model's parameters: embeddings, head unless tied, norms and biases included."""
    s = Shape.of(config)
    extra = 2 * s.width  # the two norms, then what an architecture has of its own in attention
    if s.kind == "qwen2_moe":
        extra += s.head_width * (s.heads + 2 * s.kv_heads)
    elif s.kind == "olmoe":
        extra += s.head_width * (s.heads + s.kv_heads)
    sparse = s.width * s.experts + 3 * s.width * s.expert_width * s.experts + s._shared
    dense = 3 * s.width * s.dense_width
    embeddings = s.width * s.vocabulary * (1 if s.tied else 2) + s.width
    return s.layers * (s._attention + extra) + s.moe_layers * sparse + (s.layers - s.moe_layers) * dense + embeddings


# ---- the routers ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cost:
    """What one Bayesian router adds: trained ``parameters``, all ``stored`` numbers (buffers too), ``flops`` per token."""

    parameters: int
    stored: int
    flops: float


def router_cost(method: str, d: int, E: int, *, samples: int | None = 35, curvature_rank: int | None = None, **options) -> Cost:
    """Of one layer with inside inference; ``samples=None``: sample-free. ``options`` are the method's (``FAMILIES``).

    ``curvature_rank``: of a Laplace router's input factor (the ``rank`` it is fitted with; None: d). MC dropout counts the products
    of the inputs it drops, on average; S products with masked inputs, as it is usually done, are ``2 S d E``. Whole-model
    inference instead multiplies the model's own cost by S. What a pass does once for all its tokens (SWAG's draw of weights)
    is not in ``flops``. Counted for a softmax rule. ``ValueError`` on an unknown method or option.
    """
    if method not in FAMILIES:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, FAMILIES))}")
    if unknown := set(options) - set(FAMILIES[method].defaults):
        raise ValueError(f"method {method!r} has no option {sorted(unknown)[0]!r}")
    if samples is None and method not in ("laplace", "mfvr", "fcvr", "swag"):
        raise ValueError(f"method {method!r} has no sample-free inference")
    o = FAMILIES[method].defaults | options
    weight, pairs = E * d, None if samples is None else math.ceil(samples / 2)
    rule = E * E  # the architecture's own rule, applied to other logits: a product with the identity
    average = len(SAMPLE_FREE_NODES) * E if samples is None else 0

    def dense(width: int) -> int:
        """With a root ``[E, width]`` of the covariance: drawing from it, or its square."""
        return E * width * (E if samples is None else pairs)

    def trunk(outputs: int) -> tuple[int, int]:
        """Parameters with biases, and multiply-adds, of a trunk and its heads."""
        t = max(1, d // 4) if o["trunk"] is None else o["trunk"]
        return (d + 1) * t + (t + 1) * outputs, d * t + t * outputs

    stored = None
    match method:
        case "deterministic":
            parameters, products = 0, 0
        case "mcdropout":
            parameters, products = weight, weight * (2 + o["dropout"] * samples) + rule
        case "swag":
            parameters, stored = weight, weight * (3 + o["rank"])
            products = weight * (1 + pairs) if samples else weight * (2 + o["rank"]) + dense(E + o["rank"])
            products += average + rule
        case "ensemble":
            parameters, products = weight * o["members"], weight * o["members"] + rule
        case "laplace":
            r = d if curvature_rank is None else min(curvature_rank, d)
            parameters, stored = 0, d * r + r + E + E * E + 2
            products = d * r + r * E + dense(E) + average + rule
        case "mfvr":
            parameters, products = trunk(2 * E)
            products += average + rule
        case "fcvr":
            rank = o["rank"]
            parameters, products = trunk(E + (E * (E + 1) // 2 if rank is None else E * (1 + rank)))
            products += dense(E + (rank or 0)) + average + rule
        case "temperature":
            parameters, products = 0, 2 * rule
        case "vtsr":
            parameters, products = trunk(1 if o["temperature_prior"] is None else 2)
            products += 2 * rule
    return Cost(parameters, parameters if stored is None else stored, 2 * products)


# ---- shares of a model ----------------------------------------------------------------------------------------------
def added_share(config, method: str, *, layers: int | None = None, context: int = 128, head: bool = False,
                **how) -> dict[str, float]:
    """What routers on ``layers`` of the model's MoE layers (None: all) add: ``flops``, ``parameters`` and ``stored``, as shares of
    the model's own. ``how``: as in :func:`router_cost`."""
    shape = Shape.of(config)
    layers = shape.some(layers)
    cost, whole = router_cost(method, shape.width, shape.experts, **how), model_parameters(shape)
    return {"flops": layers * cost.flops / model_flops(shape, context=context, head=head),
            "parameters": layers * cost.parameters / whole, "stored": layers * cost.stored / whole}


def trunk_under(share: float, method: str, config, *, layers: int | None = None, context: int = 128, head: bool = False,
                **how) -> int | None:
    """The widest trunk of ``method`` (mfvr, fcvr, vtsr) that adds less than ``share`` of the model's FLOPs on ``layers`` of its
    MoE layers (None: all); None if not even one unit does."""
    if "trunk" not in FAMILIES[method].defaults:
        raise ValueError(f"method {method!r} has no trunk")
    shape = Shape.of(config)
    layers = shape.some(layers)
    at = [router_cost(method, shape.width, shape.experts, trunk=t, **how).flops for t in (1, 2)]
    budget = share * model_flops(shape, context=context, head=head) / layers
    widest = math.ceil((budget - at[0]) / (at[1] - at[0]))  # cost is linear in the width; strictly less than the budget
    return widest if widest >= 1 else None


def cost_table(configs: Mapping[str, object] = SHAPES, *, ways: Iterable[tuple] = WAYS, subset: int = 10, context: int = 128,
               head: bool = False) -> list[dict]:
    """A row for every model and way: what its routers add, in percent, on all MoE layers and on ``subset`` of them."""
    rows = []
    for model, config in configs.items():
        shape = Shape.of(config)
        few = min(subset, shape.moe_layers)
        for label, method, samples, options in ways:
            row = {"model": model, "method": label, "layers": shape.moe_layers, "subset": few}
            for key, layers in (("all", None), ("subset", few)):
                share = added_share(shape, method, layers=layers, context=context, head=head, samples=samples, **options)
                row |= {f"{name}_{key}": 100 * value for name, value in share.items()}
            rows.append(row)
    return rows
