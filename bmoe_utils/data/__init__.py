"""Questions, and what is done with them before a model sees any. In reading order:

    tasks      tasks by name or path, and their splits
    hub        the public question sets: where each lies, and which of its splits serves as what
    questions  question files, row by row: items, or faults that are named
    layouts    where each published layout keeps its question, options and answer
    answers    which option a label, letter, text or number means
    prompts    how a question is laid out, the tokens that read out its options, batches
    chat       where an answer goes in a chat template
    world      the embedded world, whose true answer distribution is known; its facts are in world.json
"""
