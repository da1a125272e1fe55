"""The study's profiles: every setting, from a first look in seconds to the papers' own models."""

# What every profile sets, with the values of `cpu`: the embedded world on a laptop.
CPU = {
    "seeds": [0, 1, 2],
    # embedded base model
    "architecture": "qwen2_moe", "width": 64, "layers": 3, "experts": 8, "top_k": 2, "expert_width": 64,
    "tokenizer_kind": "word", "vocab_size": 4096,
    "pretrain_lines": 300_000, "pretrain_steps": 3500, "pretrain_batch": 64, "pretrain_lr": 3e-3,
    # MAP fine-tuning; train_size None: all of it; the linear layers that LoRA adapts (None: the architecture's queries, keys
    # and values)
    "lora_targets": None, "method": "full", "train_size": 500, "epochs": 20, "batch_size": 16, "lr": 3e-4, "weight_decay": 0.0,
    "dtype": "float32", "device_map": None,
    # prompts: read out by letters or by the option's word (None: as the task suggests), tokens at most (longer passages are
    # cut); through the tokenizer's chat template, with that one's own arguments, and what stands before an answer in a chat
    # (None: what the template writes there)
    "readout": None, "max_length": None, "chat": False, "chat_template_kwargs": None, "assistant_prefix": None,
    # what numbers among the answers of one's own files count from, 0 or 1; None: the files tell
    "answer_base": None,
    # evaluation
    "eval_batch": 64, "test_size": None,
    # chapter 1: metrics after every epoch or at the end alone; the training-set sizes of its curve. Chapter 2: against the dense posterior, fitted on so many items and
    # compared on so many
    "curves": True, "sizes": [125, 250, 500, 1000], "exact_fit": 500, "exact_items": 200,
    # chapter 13: questions that its models are trained on, so that a dense posterior over all weights can be fitted on the same, and
    # questions on which it is looked at
    "dense_fit": 200, "dense_items": 120,
    # chapters 2 to 4: what the prior is centred on, "pretrained" or "zero"
    "prior_mean": "zero", "mc_samples": 1000,
    # chapters 5 to 8: the MAP regimes compared (settings each replaces); whose routers the prior is centred on, "current",
    # "pretrained" or "tuned" (the MAP model's, trained further alone); the routers' loop
    "regimes": {"full": {}, "lora": {"method": "lora", "lr": 3e-3, "router_mean": "tuned", "curves": False}},
    "router_mean": "current", "router_epochs": 5, "router_lr": 1e-3, "beta": 0.01, "patience": 1, "accumulation": 1,
    "router_precisions": [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0],
    # samples of an inside average, passes of whole-model inference (fewer where only the validation NLL is followed), members
    # of an ensemble; validation and test items of the routers' fits and tables, items on which routing's stability is measured,
    # items at a time
    "router_samples": 35, "router_passes": 10, "validation_passes": 5, "members": 3, "router_validation": 250,
    "router_items": 500, "noise_items": 300, "router_batch": 250,
    # chapter 11: the rows of its table, each in the regimes where it applies
    "methods": ["map", "temperature", "ensemble", "checkpoint_ensemble", "mc_dropout", "expert_dropout", "swag", "last_layer_laplace",
                "laplace_lora", "blob", "tfb", "laplace_kron", "router_temperature", "router_random", "router_vtsr_kl", "router_mfvr", "router_fcvr",
                "router_mfvr_wide", "router_laplace", "joint", "joint_tuned"],
    "gammas": [0.001, 0.002, 0.005, 0.007, 0.01, 0.02, 0.05, 0.1],
}  # fmt: skip
# What both share. The routers' loop is that of arXiv 2509.23830 and 2603.09453: LoRA on the attention, then the routers alone.
LARGE = {"max_length": 1024, "regimes": {"lora": {}}, "router_mean": "tuned", "router_epochs": 3, "router_lr": 1e-4,
                 "router_passes": 35, "router_validation": 50, "router_items": 500, "router_batch": 16}
PROFILES = {
    "smoke": CPU | {
        "seeds": [0, 1], "width": 32, "layers": 2, "experts": 4, "expert_width": 32, "pretrain_lines": 20_000,
        "pretrain_steps": 150, "train_size": 100, "epochs": 12, "lr": 2e-3, "test_size": 200, "sizes": [50, 100], "exact_items": 40,
        "dense_fit": 60, "dense_items": 30,
        "mc_samples": 200, "router_epochs": 2, "router_lr": 5e-3, "router_passes": 3, "validation_passes": 2, "members": 2,
        "router_validation": 40, "router_items": 100, "noise_items": 40, "gammas": [0.01, 0.05],
        "regimes": {"full": {}, "lora": {"method": "lora", "lr": 1e-2, "router_mean": "tuned", "curves": False}},
    },
    "cpu": CPU,
    # one card of 24 to 48 GB
    "gpu": CPU | {
        "method": "lora", "train_size": None, "epochs": 3, "lr": 1e-4, "dtype": "bfloat16", "device_map": "auto",
        "sizes": [500, 2000], "eval_batch": 16, **LARGE,
    },
    "paper": CPU | {
        "method": "lora", "train_size": 5000, "epochs": 3, "lr": 1e-4, "dtype": "bfloat16", "device_map": "auto",
        "sizes": [500, 5000], "eval_batch": 16, **LARGE,
    },
}  # fmt: skip
# The model of a profile where none is named; None: the embedded one, trained by the study.
MODELS = {"smoke": None, "cpu": None, "gpu": "ibm-granite/granite-3.1-1b-a400m-instruct", "paper": "Qwen/Qwen1.5-MoE-A2.7B"}
# The embedded model on a user's own questions learns from them alone: a byte-level tokenizer trained on their text, no text
# to pretrain on, all of the training set.
OWN_QUESTIONS = {
    "cpu": {"tokenizer_kind": "bpe", "layers": 2, "pretrain_steps": 0, "train_size": None, "epochs": 8, "lr": 1e-3,
            "batch_size": 32, "sizes": [1000, 3000]},
    "smoke": {"tokenizer_kind": "bpe", "vocab_size": 1024, "pretrain_steps": 0, "sizes": [50, 100]},
}
