"""Is a checkpoint here, and whole? Asked before minutes of loading, and answered in one line that says what is missing."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def missing_files(folder: Path) -> list[str]:
    """What the folder lacks of a checkpoint: its config, any tokenizer, its weights (shard by shard where it has their index)."""
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append(TOKENIZERS[0])
    for name in WEIGHTS:
        if (folder / name).is_file():
            return missing
        if (index := folder / f"{name}.index.json").is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return missing + [shard for shard in shards if not (folder / shard).is_file()]
    return [*missing, WEIGHTS[0]]


def require(name_or_path: str | Path, revision: str | None = None) -> bool:
    """Whether all of it is on this machine, in a folder or in the hub's cache, or has to be fetched. ``FileNotFoundError``, of one line, if the folder is not a whole checkpoint, or if the hub's model is not whole in the cache
    and the hub cannot be reached or does not have it. ``ValueError`` for a revision of a folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of a model on the hub; {folder} is a folder")
        if missing := missing_files(folder):
            raise FileNotFoundError(f"{folder} is not a whole checkpoint: it has no {', no '.join(missing)}")
        return True
    try:
        missing = missing_files(Path(snapshot_download(str(name_or_path), revision=revision, local_files_only=True)))
    except HFValidationError:
        raise FileNotFoundError(f"{name_or_path} is neither a folder nor the name of a model on the hub") from None
    except LocalEntryNotFoundError:
        missing = ["any file of it"]
    if not missing:
        return True
    try:  # asked first, since a download without a network goes on trying
        HfApi().model_info(str(name_or_path), revision=revision, timeout=10)
    except Exception as error:  # no network, offline by request, no such model or commit, no access: it cannot be had here
        at = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"model {name_or_path}: the hub's cache has not {', nor '.join(missing)}, and the hub does not give it "
            f"({type(error).__name__}). Where it does: hf download {name_or_path}{at} (huggingface-cli download "
            f"{name_or_path}{at} in an older huggingface_hub)"
        ) from None
    return False


def commit(name_or_path: str | Path, revision: str | None = None) -> str | None:
    """The commit of the hub's model that is in the cache under the revision; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name_or_path).is_dir():
        return None
    file = try_to_load_from_cache(str(name_or_path), "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None
