"""Mixture-of-experts language models: had from somewhere, read out, trained and left as they were. In reading order:

    loading          a model and its tokenizer, by name or path; beneath it checkpoints and intact (is it here, and whole?),
                     adapters (a peft adapter merged in) and deepseek (a native class for one that has none)
    embedded         the study's own small models and their tokenizer
    readout          the options' logits
    layers           where a model keeps its experts; unfused: experts that are modules of their own
    experts_forward  the forward of fused experts that can be watched
    modes, offload   frozen for a while; weights that rest on the host or on disk
    training         pretraining and MAP fine-tuning; lora_targets: what LoRA adapts
    files            what was fitted on a model, as a folder with the model's fingerprint
    checkpoint       the state of a long loop
"""
