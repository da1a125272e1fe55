"""Is a checkpoint here, and whole? Asked before minutes of loading, and answered in one line that
says what is missing.

A checkpoint is a model or a peft adapter, in a folder or under the name of a repository on the
hub, whose cache is looked into first.
"""

from __future__ import annotations

from pathlib import Path

from .intact import check_index, check_weights, read_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
JSON = (
    "config.json",
    "generation_config.json",
    ADAPTER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a peft adapter and no model's weights (some training programs put
    the base's config beside it)."""
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.index.json")]
    return (folder / ADAPTER).is_file() and not any((folder / name).is_file() for name in names)


def missing_files(folder: Path) -> list[str]:
    """What the folder lacks: of a model its config, any tokenizer, its weights (shard by shard
    where it has their index); of an adapter its weights. ``ValueError``, of one line, where one of
    the files that are there is damaged."""
    for name in JSON:
        if (folder / name).is_file():
            read_json(folder / name)
    if is_adapter(folder):
        found = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
        for path in found:
            check_weights(path)
        return [] if found else [ADAPTER_WEIGHTS[0]]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append(TOKENIZERS[0])
    for name in WEIGHTS:
        if (folder / name).is_file():
            check_weights(folder / name)
            return missing
        if (index := folder / f"{name}.index.json").is_file():
            return missing + [
                shard for shard in check_index(index) if not (folder / shard).is_file()
            ]
    return [*missing, WEIGHTS[0]]


def require(name_or_path: str | Path, revision: str | None = None) -> Path | None:
    """The folder that all of it is in, the one given or one in the hub's cache; None for a model
    that has to be fetched. An adapter that is not in the cache is fetched (it is small).

    ``FileNotFoundError``, of one line, if the folder is not a whole checkpoint, or if the hub's is
    not whole in the cache and the hub cannot be reached or does not have it. ``ValueError`` for a
    damaged file and a revision of a folder.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a model on the hub; {folder} is a folder"
            )
        if missing := missing_files(folder):
            raise FileNotFoundError(
                f"{folder} is not a whole checkpoint: it has no {', no '.join(missing)}"
            )
        return folder
    try:
        cached = Path(
            snapshot_download(str(name_or_path), revision=revision, local_files_only=True)
        )
        missing = missing_files(cached)
    except HFValidationError:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor the name of a model on the hub"
        ) from None
    except LocalEntryNotFoundError:
        missing = ["any file of it"]
    if not missing:
        return cached
    try:  # asked first, since a download without a network goes on trying
        files = {
            s.rfilename
            for s in HfApi().model_info(str(name_or_path), revision=revision, timeout=10).siblings
            or ()
        }
        if ADAPTER in files and not any(name.startswith(WEIGHTS) for name in files):
            return Path(snapshot_download(str(name_or_path), revision=revision))
    # no network, offline by request, no such model or commit, no access: it cannot be had here
    except Exception as error:
        at = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"model {name_or_path}: the hub's cache has not {', nor '.join(missing)}, and the hub "
            f"does not give it ({type(error).__name__}). Where it does: hf download "
            f"{name_or_path}{at} (huggingface-cli download {name_or_path}{at} in an older "
            "huggingface_hub)"
        ) from None
    return None


def base_of(folder: Path) -> tuple[str, str | None]:
    """An adapter's base, a folder or a name on the hub, and its revision. A relative path counts
    from the adapter's folder, or where that has no such folder from the working directory.
    ``ValueError``, of one line, without a base and for an adapter whose base is, in the end,
    itself."""
    chain = [folder.resolve()]
    name, revision = _named_base(folder)
    base = name
    while (current := Path(base)).is_dir() and is_adapter(current):
        if current.resolve() in chain:
            raise ValueError(
                f"{folder / ADAPTER} names a base that is, in the end, the adapter itself "
                f"({base}): put the model that it was trained on in base_model_name_or_path"
            )
        chain.append(current.resolve())
        base, _ = _named_base(current)
    return name, revision


def _named_base(folder: Path) -> tuple[str, str | None]:
    described = read_json(folder / ADAPTER)
    name = described.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"{folder / ADAPTER} names no base model: put the model that the adapter was trained "
            "on in base_model_name_or_path"
        )
    base = str(folder / name) if (folder / name).is_dir() else name
    return base, None if Path(base).is_dir() else described.get("revision")


def commit(name_or_path: str | Path, revision: str | None = None) -> str | None:
    """The commit of the hub's model or adapter that is in the cache under the revision; None for a
    folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name_or_path).is_dir():
        return None
    for name in ("config.json", ADAPTER):
        file = try_to_load_from_cache(str(name_or_path), name, revision=revision)
        if isinstance(file, str):
            return Path(file).parent.name
    return None
