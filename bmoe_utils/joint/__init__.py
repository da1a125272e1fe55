"""Both posteriors together. In reading order:

    posterior    sampled routings outside, the experts' linearised posterior inside
    information  whose uncertainty an answer's is: its parts, in nats; pure functions of tensors
"""
