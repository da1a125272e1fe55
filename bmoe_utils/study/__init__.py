"""The study around the methods; nothing in the other rooms needs it. In reading order:

    study, profiles        one profile on one task and model; every profile's settings
    stages/                what is computed, each stage resting on the one before
    store, source          artefacts by their content, and by the code that computes them
    comparison, main_table the baselines as a stage; the rows of the main table
    anatomy, reach, blocks, penalised   why the experts' posterior helps in one place and not in another
    explorer               one question under both posteriors, interactively
    plots/                 every figure; output, tables: where figures and their numbers go
    run/                   the chapters headless: the command line's work
"""
