"""What the posteriors are compared with. In reading order:

    averaging        dropout masks, ensembles, SWAG, Gaussian logits
    last_layer       Laplace over the rows of the head that read out options
    lora_laplace     Laplace over LoRA's matrices
    lora_posteriors  BLoB and TFB: LoRA's matrices sampled
"""
