"""Is a checkpoint's file whole? Told from its first bytes and its size, so that minutes of loading
do not end in a raw error."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a large file
AGAIN = "copy or download it again"
# What a header that is no JSON, or not that of tensors, ends in.
DAMAGED = (json.JSONDecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError)
DAMAGED += (AttributeError, SafetensorError)


def _beginning(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def read_json(path: Path) -> dict:
    """The object in a JSON file; ``ValueError``, of one line, that names the file where there is
    none."""
    if _beginning(path, len(POINTER)) == POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: git lfs pull")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is no UTF-8
        said = " ".join(str(error).split())[:100]
        raise ValueError(f"{path} is not valid JSON ({said}): {AGAIN}, or mend it there") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, not an object: {AGAIN}")
    return found


def tensors(path: Path) -> dict[str, list[int]]:
    """Name -> shape of every tensor in a safetensors file, from its header; ``ValueError``, of one
    line, where the header is damaged or the file not as long as it says."""
    size, start = path.stat().st_size, _beginning(path, 32)
    if start.startswith(POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: git lfs pull")
    if len(start) < 8 or (length := struct.unpack("<Q", start[:8])[0]) > size - 8:
        raise ValueError(f"{path} is cut short or no safetensors file ({size:,} bytes): {AGAIN}")
    try:
        parts = json.loads(_beginning(path, 8 + length)[8:]).items()
        ends = [int(part["data_offsets"][1]) for name, part in parts if name != "__metadata__"]
        if size < (expected := 8 + length + max(ends, default=0)):
            raise ValueError(f"{path} is cut short ({size:,} of {expected:,} bytes): {AGAIN}")
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except DAMAGED as error:
        raise ValueError(
            f"{path} has a damaged header ({' '.join(str(error).split())[:100]}): {AGAIN}"
        ) from None


def check_weights(path: Path) -> None:
    """``ValueError``, of one line, for a file of weights that is cut short."""
    if path.suffix == ".safetensors":
        tensors(path)
    elif (start := _beginning(path, len(POINTER))) == POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: git lfs pull")
    elif not zipfile.is_zipfile(path) and not start.startswith(b"\x80"):  # very old: a pickle
        raise ValueError(
            f"{path} is cut short or no file of torch's ({path.stat().st_size:,} bytes): {AGAIN}"
        )


def check_index(path: Path) -> list[str]:
    """The weight files that an index names, of those that are there also whether each has the
    tensors that the index puts there. ``ValueError``, of one line, if it is damaged or does not fit
    them."""
    places = read_json(path).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(v, str) and v == Path(v).name for v in places.values())
    ):
        raise ValueError(f"{path} has no weight_map from every tensor's name to its file: {AGAIN}")
    files = sorted(set(places.values()))
    for name in files:
        if not (shard := path.with_name(name)).is_file():
            continue
        check_weights(shard)
        if shard.suffix != ".safetensors":
            continue
        has = tensors(shard)
        if lost := [k for k, v in places.items() if v == name and k not in has]:
            raise ValueError(
                f"{path} looks for {lost[0]!r} in {name}, which does not have it: index and "
                f"weights are of different checkpoints, or one is damaged; {AGAIN}"
            )
    return files
