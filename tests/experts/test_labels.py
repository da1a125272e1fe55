"""Labels drawn for the Monte-Carlo Fisher: the model's law, and a function of the item alone."""

import torch
from tiny import single_items, tiny_batch

from bmoe_utils.experts.labels import drawn_labels, item_marks


def test_they_follow_the_models_law_and_never_an_option_that_is_not_there():
    """20,000 items: every frequency within four standard errors (the chance that one of twelve is not: 1 in 1,300; the seeds are fixed)."""
    batch = tiny_batch(20_000, length=12, ragged=False)
    for seed, logits in enumerate(([0.0, 1.0, -1.0, 0.5], [-torch.inf, 3.0, 0.0, 3.0], [2.0, -torch.inf, 0.0, -torch.inf])):
        logits = torch.tensor(logits)
        labels = drawn_labels(logits.expand(20_000, 4), batch, seed)
        p, n = logits.double().softmax(0), torch.bincount(labels, minlength=4).double()
        assert ((n / 20_000 - p).abs() <= 4 * (p * (1 - p) / 20_000).sqrt()).all()
        assert (n[p == 0] == 0).all()


def test_they_depend_on_the_item_alone():
    batch = tiny_batch(50, seed=1)
    logits = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = -torch.inf
    labels, marks = drawn_labels(logits, batch, 3), item_marks(batch)
    assert len(set(marks)) == 50 and max(marks) < 2**63
    alone = [drawn_labels(logits[i : i + 1], item, 3) for i, item in enumerate(single_items(batch))]  # without their padding
    assert torch.equal(torch.cat(alone), labels)
    backwards = {k: v.flip(0) for k, v in batch.items()}
    assert torch.equal(drawn_labels(logits.flip(0), backwards, 3).flip(0), labels)
    assert not torch.equal(drawn_labels(logits, batch, 4), labels)
    assert item_marks(batch | {"labels": batch["labels"] + 1}) == marks
    other = item_marks(batch | {"option_ids": batch["option_ids"].roll(1, 1)})
    assert [i for i in range(50) if other[i] == marks[i]] == [1]  # the one whose last option is none
