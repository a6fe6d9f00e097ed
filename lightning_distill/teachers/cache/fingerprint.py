"""Hashes that tell whether two teachers, or two data sets, are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill.teachers.cache.shards import bytes_of
from lightning_distill.teachers.teacher import Teacher

SAMPLES = 32
"""Samples of a data set that its fingerprint looks at."""


def fingerprint(module: nn.Module) -> str:
    """Hash of a network's weights, buffers, the classes of its parts, and its configuration if it has one.

    The device does not matter, nor the path that a Hugging Face network came from; the dtype of the weights does.
    Under sharding (FSDP and the like) take it before the network is wrapped.

    Args:
        module: The network; its weights must be in memory.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: If a weight is on the meta device.
    """
    digest = hashlib.blake2b(digest_size=16)
    # Without the file of the class, which is `__main__` in the script that defines it.
    parts = {name: type(part).__qualname__ for name, part in module.named_modules()}
    digest.update(json.dumps([parts, _configuration(module)], sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}".encode())
            continue
        if value.is_meta:
            raise ValueError(f"`module` has no weights in memory: {name!r} is on the meta device. Load them first.")
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def _configuration(module: nn.Module) -> dict[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if not callable(to_dict):
        return {}
    passing = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # where it was, not what it is
    return {key: value for key, value in to_dict().items() if key not in passing}


def teacher_fingerprint(teacher: Teacher) -> str:
    """:func:`fingerprint` of the network that a teacher is.

    Raises:
        ValueError: If the teacher is no network.
    """
    network = getattr(teacher, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{type(teacher).__name__} is no network whose weights could tell what it is. Name it, with its version: "
            '`CacheWriter(..., teacher="my teacher, 3")`.'
        )
    return fingerprint(network)


def data_fingerprint(data: Any) -> str:
    """Hash of a data set: its length and the contents of up to 32 of its samples, evenly spaced.

    Args:
        data: A data set with ``len`` and ``[i]``, a data loader over one, or a data module whose
            ``predict_dataloader`` gives the samples that are cached.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: If the data set has no length, or gives something else each time it is read.
        TypeError: If a sample holds something else than numbers, texts and arrays.

    Example:
        >>> data_fingerprint([1.0, 2.0]) == data_fingerprint([1.0, 2.0]) != data_fingerprint([1.0, 3.0])
        True
    """
    if isinstance(data, L.LightningDataModule):
        data = data.predict_dataloader()
    if isinstance(data, DataLoader):
        data = data.dataset
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise ValueError(
            f"`data` must have a length and samples by position, got {type(data).__name__}. Name the data set, with "
            'its version: `CacheWriter(..., data="my data, 3")`.'
        )
    first, again = _hash_samples(data), _hash_samples(data)
    if first != again:
        raise ValueError(
            "`data` gives other samples each time it is read (random transforms?), so the teacher would not see what "
            "the student sees. Cache without the transforms or seed them per sample, and name the data set: "
            '`CacheWriter(..., data="my data, 3")`.'
        )
    return first


def _hash_samples(data: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    size = len(data)
    digest.update(f"{size}".encode())
    for position in sorted({i * max(size - 1, 0) // (SAMPLES - 1) for i in range(SAMPLES)} if size else ()):
        _hash_value(digest, data[position])
    return digest.hexdigest()


def _hash_value(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        digest.update(f"{type(value).__name__} {value!r}".encode())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"key {key!r}".encode())
            _hash_value(digest, value[key])
    elif isinstance(value, Sequence):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _hash_value(digest, item)
    else:
        array = np.asarray(value)  # images, too
        if array.dtype == object:
            raise TypeError(
                f"A sample holds a {type(value).__name__}, whose contents cannot be told. Name the data set, with its "
                'version: `CacheWriter(..., data="my data, 3")`.'
            )
        digest.update(f"array {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
