"""Tasks by name or path: their splits, and where each came from. The hub's sets are listed in :mod:`.hub`."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import hub
from .prompts import length_batches, make_loader, option_tokens, options, prompt, same_question
from .questions import LETTERS, SUFFIXES, MalformedQuestions, Rows, indexed, read_questions, read_rows, to_item, to_items
from .world import build_splits, load_world, pretraining_lines, world_file

__all__ = ["MalformedQuestions", "Split", "Task", "draw", "learning_texts", "length_batches", "load_task", "make_loader",
           "option_tokens", "options", "prompt", "read_questions"]  # fmt: skip

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2  # of a single file


class Split(list):
    """A list of items ``{"id", "question", "choices": [...], "answer": int}`` (and ``"passage"``, ``"p_star"`` where there is
    one) that knows how its questions are read out: ``letters`` at ``Answer:``, or ``cloze``, the option's own word there.

    ``origin``, JSON values to write beside results: ``task``, ``split``, ``source`` (repository or path), ``revision`` (the
    commit, or the files' sha256), ``seed`` (of what was held out), what was ``left_out``: a reason by the item's id, and
    ``answer_base`` where it was stated.
    """

    def __init__(self, items: Sequence[dict], readout: str, origin: Mapping | None = None):
        super().__init__(items)
        self.readout = readout
        self.origin = dict(origin or {})

    def subset(self, n: int | None) -> Split:
        """The first ``n`` items (all if None or more than there are)."""
        return Split(self[:n], self.readout, self.origin)


class Task(dict):
    """A task's splits by name. One that it does not have is a ``KeyError`` that says which there are."""

    def __init__(self, name: str, splits: Mapping[str, Split]):
        super().__init__(splits)
        self.name = name

    def __missing__(self, split: str) -> Split:
        raise KeyError(f"the task {self.name} has no split {split!r}; it has: {', '.join(self)}")


def load_task(name: str | Path, *, seed: int = 0, readout: str | None = None, source: str | Path | None = None,
              answer_base: int | None = None) -> Task:  # fmt: skip
    """Splits of a task: ``"world"``, a question set of the papers by name, or a user's own files by path.

    ``"world"``: the embedded one, with the true ``p_star``.
    ``openbookqa``, ``arc_easy``, ``arc_challenge``, ``winogrande_s``, ``winogrande_m``, ``boolq``, ``sciq``, ``medmcqa``,
    ``commonsenseqa``, ``hellaswag``, ``piqa``, ``siqa``, ``truthfulqa``, ``mmlu_pro``, ``mmlu:<subject>``: from the hub's
    cache, downloaded where it is not there yet, at a fixed commit; or from ``source``, a folder with the repository's parquet
    files. Which hub split serves as what: :mod:`bmoe_utils.data.hub`.
    A folder: ``train`` and ``test`` (and ``validation``, else a seeded tenth of train is cut off for it; never the reverse)
    as ``.parquet``, ``.jsonl``, ``.json`` or ``.csv``, or saved by the datasets library (``save_to_disk``). A single such
    file: a seeded fifth of it is test, a tenth of the rest validation. One row a question: ``question`` with 2 to 26
    ``choices`` and ``answer`` (index from 0, letter or text) and optionally ``passage`` and ``id``, or any layout of
    :mod:`bmoe_utils.data.layouts`. Malformed rows are all named, none is dropped.

    Args:
        seed: of what is cut off the training rows; of the questions themselves in ``"world"``.
        readout: by default ``cloze`` where every option is one of a few recurring single words (yes / no), else ``letters``.
        answer_base: 0 or 1, what the numbers among a user's own answers count from. By default the documented 0 for
            ``answer`` beside ``choices``; in other columns an answer 0, or one that is the number of options, tells, and
            ``ValueError`` where no split has either.
    """
    name = str(name)
    task = hub.hub_task(name)
    if source is not None and task is None:
        raise ValueError(f"source is for the hub's question sets ({', '.join(hub.NAMES)}), not for {name!r}")
    if answer_base is not None and (task is not None or name == "world"):
        raise ValueError(f"answer_base is for your own files: what the answers of {name} count from is known")
    if name == "world":
        splits = build_splits(load_world(), seed=seed)
        origin = {"source": "embedded world", "revision": hub.content_hash([world_file()]), "seed": seed, "left_out": {}}
        return _task(name, splits, dict.fromkeys(splits, origin), readout or "cloze")
    if task is not None:
        return _task(name, *_hub_splits(name, task, seed, source), readout)
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"task {name!r} is neither 'world' nor a set of the hub ({', '.join(hub.NAMES)}) nor a file or folder "
                         "of questions (.parquet, .jsonl, .json or .csv, or a folder of the datasets library)")
    return _task(name, *_own_splits(path, seed, answer_base), readout)


def _task(name: str, splits: Mapping[str, list[dict]], origins: Mapping[str, dict], readout: str | None) -> Task:
    if readout is None:
        words = {c for item in next(iter(splits.values())) for c in item["choices"]}
        readout = "cloze" if len(words) <= 10 and all(w.isalpha() for w in words) else "letters"
    return Task(name, {k: Split(v, readout, {"task": name, "split": k, **origins[k]}) for k, v in splits.items()})


# ---- the hub's sets -------------------------------------------------------------------------------------------------
def _hub_splits(name: str, task: hub.HubTask, seed: int, source: str | Path | None) -> tuple[dict, dict]:
    if source is None:
        files = {split: [file] for split, file in hub.cached_files(task).items()}
    else:
        files = hub.local_files(task, Path(source).expanduser())
    splits, origins = {}, {}
    for split, paths in files.items():
        splits[split], left_out = _hub_items(name, task, split, paths)
        revision = task.revision if source is None else hub.content_hash(paths)
        origins[split] = {"source": task.repo, "configuration": task.folder, "hub_split": task.splits[split],
                          "revision": revision, "seed": None, "left_out": left_out}
    if left_out := sum(len(o["left_out"]) for o in origins.values()):
        warnings.warn(f"{name}: {left_out} rows left out, being no questions; each split's origin names them", stacklevel=3)
    if "train" in splits:
        for held in ("validation", "test"):
            splits["train"], double = _without(splits["train"], splits.get(held, ()))
            origins["train"]["left_out"] |= {item["id"]: f"also in {held}" for item in double}
        if "validation" not in splits:
            splits["train"], splits["validation"] = hold_out(splits["train"], seed, VALIDATION_SHARE)
            origins["validation"] = origins["train"] = origins["train"] | {"seed": seed}
    return {k: splits[k] for k in ("train", "validation", "test", "dev") if k in splits}, origins


def _hub_items(name: str, task: hub.HubTask, split: str, paths: list[Path]) -> tuple[list[dict], dict[str, str]]:
    """A split's items, and why what is missing among them is missing: nobody can mend the hub's rows."""
    items, left_out = [], {}
    for number, row in enumerate(hub.hub_rows(task, paths), 1):
        default = f"{name}-{task.splits[split]}-{number:05d}"
        try:
            items.append(to_item(row, default, answer_base=task.answer_base))
        except ValueError as error:
            left_out[str(row.get("id") or default)] = str(error)
    if not items:
        first = next((f", the first: {reason}" for reason in left_out.values()), "")
        raise ValueError(f"{', '.join(map(str, paths))}: no question of {name} among {len(left_out)} rows{first}")
    return items, left_out


# ---- a user's own ---------------------------------------------------------------------------------------------------
def _own_splits(path: Path, seed: int, answer_base: int | None) -> tuple[dict, dict]:
    files = {}
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: questions are read from {', '.join(SUFFIXES)}")
        sources, files["all"] = {"all": [read_rows(path)]}, [path]
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        sources, files = _saved_rows(path)
    else:
        files = {split: found for split in ("train", "validation", "test") if (found := hub.split_files(path, split))}
        sources = {split: [read_rows(path) for path in found] for split, found in files.items()}
    splits = _items(sources, answer_base)
    seeds = dict.fromkeys(splits)
    if "all" in splits:
        splits["train"], splits["test"] = hold_out(splits.pop("all"), seed, TEST_SHARE)
        files, seeds = dict.fromkeys(splits, files["all"]), dict.fromkeys(splits, seed)
    if missing := {"train", "test"} - set(splits):
        held = sorted(p.name for p in path.iterdir())[:10]
        there = f"; there are: {', '.join(held)}" if held else ""
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))} file ({', '.join(SUFFIXES)}){there}")
    for held in ("validation", "test"):
        if double := _without(splits["train"], splits.get(held, ()))[1]:
            first = double[0]["id"]
            warnings.warn(f"{path}: of the training questions {len(double)} are also in {held}, first {first!r}", stacklevel=3)
    if "validation" not in splits:
        splits["train"], splits["validation"] = hold_out(splits["train"], seed, VALIDATION_SHARE)
        files["validation"], seeds["train"], seeds["validation"] = files["train"], seed, seed
    revisions = {k: hub.content_hash(files[k]) for k in splits}
    origins = {k: {"source": str(path), "revision": revisions[k], "seed": seeds[k], "left_out": {}}
               | ({} if answer_base is None else {"answer_base": answer_base}) for k in splits}  # fmt: skip
    return {k: splits[k] for k in ("train", "validation", "test")}, origins


def _items(sources: Mapping[str, list[Rows]], answer_base: int | None) -> dict[str, list[dict]]:
    """The items of every split: one decision for all on what their answers count from."""
    read = iter(to_items([rows for parts in sources.values() for rows in parts], answer_base))
    return {split: [item for _ in parts for item in next(read)] for split, parts in sources.items()}


def _saved_rows(path: Path) -> tuple[dict[str, list[Rows]], dict[str, list[Path]]]:
    """The rows of what ``save_to_disk`` wrote, of a dataset (as ``all``) or of several by split, and the files of each."""
    from datasets import ClassLabel, load_from_disk

    try:
        saved = load_from_disk(path)
    except Exception as error:  # whatever its files raise when they are damaged: pyarrow's, json's, the library's own
        raise ValueError(f"{path} cannot be read as a dataset that was saved: {str(error).splitlines()[0]}") from None
    parts = {k: saved[k] for k in ("train", "validation", "test") if k in saved} if isinstance(saved, dict) else {"all": saved}
    folders = {k: path if k == "all" else path / k for k in parts}
    names = {k: {c: f.names for c, f in part.features.items() if isinstance(f, ClassLabel)} for k, part in parts.items()}
    return ({k: [Rows(folders[k], "row", k, list(enumerate(indexed(part, names[k]), 1)))] for k, part in parts.items()},
            {k: sorted(folder.glob("*.arrow")) for k, folder in folders.items()})


# ---- parts of a split -----------------------------------------------------------------------------------------------
def hold_out(items: list[dict], seed: int, share: float) -> tuple[list[dict], list[dict]]:
    """The items in seeded order without a ``share`` of them, and that share; a question asked twice goes to one side."""
    items = list(items)
    random.Random(seed).shuffle(items)
    cut = max(1, round(share * len(items)))
    rest, held = _without(items, items[:cut])
    if not rest:
        raise ValueError(f"{len(items)} questions are too few to hold some of them out")
    return rest, held


def _without(items: Sequence[dict], held: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """The items that ask nothing that ``held`` asks, and the others."""
    asked = {same_question(item) for item in held}
    return [i for i in items if same_question(i) not in asked], [i for i in items if same_question(i) in asked]


def draw(pool: Split, seed: int, size: int | None) -> Split:
    """A seeded sample of ``size`` items (all if None) in seeded order; nested in ``size``."""
    order = list(range(len(pool)))
    random.Random(1000 + seed).shuffle(order)
    return Split([pool[i] for i in order[:size]], pool.readout, pool.origin)


def learning_texts(name: str, train: Split, lines: int) -> tuple[list[str], list[str]]:
    """What an embedded model learns its language from, and the option words that must be single tokens.

    ``"world"``: ``lines`` lines of its pretraining text, and its values. Any other task: the prompts of ``train`` and their
    options, never which one is right.
    """
    if name == "world":
        world = load_world()
        values = {value for relation in world.relations for value in world.vocabulary(relation)}
        return pretraining_lines(world, lines), sorted(values)
    words = {word for item in train for word in item["choices"]} if train.readout == "cloze" else LETTERS
    return [prompt(item, train.readout) for item in train], sorted(words)
