"""Bayesian routers. In reading order:

    maths      pure functions of tensors
    families   one class a method: what it adds to a layer's logits
    rules      each architecture's own top-K rule, kept
    attach     routers on a model: inference, signals, files
    fit        one training loop, and what each method makes of it
    tune       the routers themselves trained, with all else frozen
    stability  how much of the choice of experts survives noise
    costs      parameters and FLOPs, by counting
"""
