"""The Laplace posterior over the experts' second linear layers. In reading order:

    laplace              the posterior: fit, evidence, prior, predictions
    capture              one forward pass: every expert's inputs, and the graph at its outputs
    columns, labels      the gradients at them, a column of the Fisher at a time; the labels that some Fishers draw
    jacobians            per-item Jacobians and their inner products, in the cheapest form
    sums, sketch         what is summed over a fitting set; low-rank factors in one pass
    curvature            the maths of the posterior: eigenbases, blocks, links
    prior, validation    the prior's precision, by the evidence and by held-out items
    fitting              the passes over the data, resumable; parallel: over several processes; on_disk: within little memory
    files                a fitted posterior as a folder
    exact                the dense reference; weight_samples: what linearisation leaves out
"""
