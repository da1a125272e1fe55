"""The question sets of the papers on the Hugging Face hub: where each lies, which of its splits is used for what.

==============  =======================================  ==================  =================  ==================
task            repository, configuration                train               validation         test
==============  =======================================  ==================  =================  ==================
openbookqa      allenai/openbookqa, main                 train (4957)        validation (500)   test (500)
arc_easy        allenai/ai2_arc, ARC-Easy                train (2251)        validation (570)   test (2376)
arc_challenge   allenai/ai2_arc, ARC-Challenge           train (1119)        validation (299)   test (1172)
sciq            allenai/sciq                             train (11679)       validation (1000)  test (1000)
winogrande_s    allenai/winogrande, winogrande_s         train (640), cut    a tenth of train   validation (1267)
winogrande_m    allenai/winogrande, winogrande_m         train (2558), cut   a tenth of train   validation (1267)
boolq           google/boolq                             train (9427), cut   a tenth of train   validation (3270)
commonsenseqa   tau/commonsense_qa                       train (9741), cut   a tenth of train   validation (1221)
medmcqa         openlifescienceai/medmcqa                train, cut          a tenth of train   validation
mmlu:<subject>  cais/mmlu, <subject>                     none                validation         test
mmlu_pro        TIGER-Lab/MMLU-Pro                       none                validation (70)    test (12032)
hellaswag       Rowan/hellaswag                          train (39905), cut  a tenth of train   validation (10042)
piqa            ybisk/piqa, plain_text                   train (16113), cut  a tenth of train   validation (1838)
siqa            allenai/social_i_qa, default             train (33410), cut  a tenth of train   validation (1954)
truthfulqa      truthfulqa/truthful_qa, multiple_choice  none                none               validation (817)
==============  =======================================  ==================  =================  ==================

Named are the hub's splits, with their sizes. Where its test split has no labels (WinoGrande, CommonsenseQA, MedMCQA,
HellaSwag, PIQA) or there is none (BoolQ, SIQA), its validation split is the test set, as is usual, and a tenth of its
training rows, drawn by the ``seed`` of :func:`~bmoe_utils.data.tasks.load_task`, is cut off for validation. MedMCQA: only the
rows whose subject is Medicine, of 182,822 and 4,183. MMLU, MMLU-Pro and TruthfulQA (its mc1 targets) are for evaluation;
MMLU's five ``dev`` questions, meant as examples in the prompt, are a split of their own.

A training row that asks the same as one of validation or test (14 questions of OpenBookQA's test set are in its training set,
3 of ARC-Easy's) is left out of training, and so is a row that is no question; the split's ``origin`` names each. The
Laplace-LoRA suite trains on all of train; the routers' papers take 5,000 training, 50 validation and 500 test questions
(``draw`` and ``subset``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .questions import SUFFIXES

OFFICIAL = MappingProxyType({"train": "train", "validation": "validation", "test": "test"})
UNLABELLED_TEST = MappingProxyType({"train": "train", "test": "validation"})
NO_TRAIN = MappingProxyType({"validation": "validation", "test": "test", "dev": "dev"})
CONVERTED = "{split}/0000.parquet"  # how the hub names the files that it converts to parquet itself


@dataclass(frozen=True)
class HubTask:
    """``repo`` at the commit ``revision``, the ``folder`` of its parquet files (the configuration), our splits by the hub's
    name for them, and, where only some rows belong to the task, ``only``: the column and its value. ``answer_base``: what
    a number among its answers counts from; ``name``: how its files are named."""

    repo: str
    revision: str
    folder: str
    splits: Mapping[str, str]
    only: tuple[str, str] | None = None
    answer_base: int = 0
    name: str = "{split}-00000-of-00001.parquet"

    def file(self, split: str) -> str:
        """The parquet file of one of our splits."""
        return f"{self.folder}/{self.name.format(split=self.splits[split])}"


_ARC = ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453")
_WINOGRANDE = ("allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5")
TASKS = {
    "openbookqa": HubTask("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main", OFFICIAL),
    "arc_easy": HubTask(*_ARC, "ARC-Easy", OFFICIAL),
    "arc_challenge": HubTask(*_ARC, "ARC-Challenge", OFFICIAL),
    "sciq": HubTask("allenai/sciq", "2c94ad3e1aafab77146f384e23536f97a4849815", "data", OFFICIAL),
    "winogrande_s": HubTask(*_WINOGRANDE, "winogrande_s", UNLABELLED_TEST, answer_base=1),
    "winogrande_m": HubTask(*_WINOGRANDE, "winogrande_m", UNLABELLED_TEST, answer_base=1),
    "boolq": HubTask("google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", "data", UNLABELLED_TEST),
    "commonsenseqa": HubTask("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155", "data", UNLABELLED_TEST),
    "medmcqa": HubTask("openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868", "data", UNLABELLED_TEST,
                       only=("subject_name", "Medicine")),
    "mmlu_pro": HubTask("TIGER-Lab/MMLU-Pro", "b189ec765aa7ed75c8acfea42df31fdae71f97be", "data",
                        {"validation": "validation", "test": "test"}),
    "hellaswag": HubTask("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76", "data", UNLABELLED_TEST),
    # of these two the repository holds a script; its rows are on the branch refs/convert/parquet, whose commits these are
    "piqa": HubTask("ybisk/piqa", "142c51238b3ca2bc61e9a075913871b8b600e8e1", "plain_text", UNLABELLED_TEST, name=CONVERTED),
    "siqa": HubTask("allenai/social_i_qa", "537a2ec8ec565adc0b70b70752893e59e024df26", "default", UNLABELLED_TEST,
                    answer_base=1, name=CONVERTED),
    "truthfulqa": HubTask("truthfulqa/truthful_qa", "741b8276f2d1982aa3d5b832d3ee81ed3b896490", "multiple_choice",
                          {"test": "validation"}),
}  # fmt: skip
MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
MMLU_SUBJECTS = """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology
us_foreign_policy virology world_religions""".split()
NAMES = (*TASKS, "mmlu:<subject>")


def hub_task(name: str) -> HubTask | None:
    """The entry of a task's name, None if it is no name of a hub task. ``ValueError`` on an unknown MMLU subject."""
    if not name.startswith("mmlu:"):
        return TASKS.get(name)
    if (subject := name.removeprefix("mmlu:")) not in MMLU_SUBJECTS:
        raise ValueError(f"MMLU has no subject {subject!r}; there are: {', '.join(MMLU_SUBJECTS)}")
    return HubTask(*MMLU, subject, NO_TRAIN)


def cached_files(task: HubTask) -> dict[str, Path]:
    """The task's parquet file of every split in the hub's cache, downloaded if it is not there.

    A file that is there is used without asking the hub: the revision is fixed, so it cannot have changed.
    ``FileNotFoundError``, of one line, where a file is neither there nor to be had.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    where = {"repo_type": "dataset", "revision": task.revision}
    found = {split: try_to_load_from_cache(task.repo, task.file(split), **where) for split in task.splits}
    missing = [split for split, path in found.items() if not isinstance(path, str)]
    try:
        if missing:  # asked first, since a download without a network would go on trying for half a minute
            HfApi().dataset_info(task.repo, revision=task.revision, timeout=10)
        found |= {split: hf_hub_download(task.repo, task.file(split), **where) for split in missing}
    except Exception as error:  # no network, offline by request, no such commit, no access: in each case the files are not here
        raise FileNotFoundError(
            f"{', '.join(task.file(split) for split in missing)} of the dataset {task.repo}: not in the hub's cache, and the hub "
            f"cannot be reached ({type(error).__name__}). Where it can: hf download --repo-type dataset {task.repo} --revision "
            f"{task.revision} --include '{task.folder}/*' (huggingface-cli download ... in an older huggingface_hub)"
        ) from None
    return {split: Path(path) for split, path in found.items()}


def split_files(folder: Path, split: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """A split's file in a folder, named by the split, or its parquet shards as the hub names them
    (``train-00000-of-00002.parquet``); empty if there are none. ``ValueError`` where two formats would do."""
    found = [path for suffix in suffixes if (path := folder / f"{split}{suffix}").is_file()]
    shards = sorted(folder.glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
    if len(found) + bool(shards) > 1:
        raise ValueError(f"{folder} has {', '.join(p.name for p in [*found, *shards])}: leave one {split} file")
    return found or shards


def local_files(task: HubTask, folder: Path) -> dict[str, list[Path]]:
    """The task's parquet files of every split in a folder that mirrors the repository, or that holds the configuration's
    files. ``FileNotFoundError`` names the splits that are not there."""
    for place in (folder / task.folder, folder):
        exact = {split: place / task.name.format(split=name) for split, name in task.splits.items()}
        found = {split: [exact[split]] if exact[split].is_file() else split_files(place, name, (".parquet",))
                 for split, name in task.splits.items()}  # fmt: skip
        if all(found.values()):
            return found
    missing = [f"{name}.parquet" for split, name in task.splits.items() if not found[split]]
    raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)} of {task.repo}, not in {task.folder}/ either")


def hub_rows(task: HubTask, files: list[Path]) -> list[dict]:
    """The task's rows, read by the datasets library (streamed: it keeps no second copy on disk). ``ValueError`` where the files
    are damaged or lack the column that says which rows are the task's."""
    from datasets import load_dataset

    names = ", ".join(map(str, files))
    try:
        rows = list(load_dataset("parquet", data_files={"rows": [str(f) for f in files]}, split="rows", streaming=True))
    except Exception as error:  # pyarrow's own or the library's, by what is wrong
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{names} cannot be read as parquet: {said}") from None
    if task.only and rows and task.only[0] not in rows[0]:
        raise ValueError(f"{names} has no column {task.only[0]!r}, as {task.repo} has: {', '.join(rows[0])}")
    return [row for row in rows if task.only is None or row[task.only[0]] == task.only[1]]


def content_hash(files: list[Path]) -> str:
    """sha256 over the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
