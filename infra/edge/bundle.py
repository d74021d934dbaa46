"""The two files of a policy bundle, read strictly: whatever else they may hold is refused by name when they are loaded.

A signature says who made a policy, not that it can run. `architecture.json` is checked against the fields that this
version knows, then `policy.safetensors` against the tensors that such an architecture has: names, types, shapes, bytes.
The container is read here, by its published format (https://huggingface.co/docs/safetensors): the library's numpy
reader raises TypeError at bfloat16, takes the last of two equal names, and reads the whole file before it looks.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, CorruptDataError
from infra.files import open_regular

Array = npt.NDArray[np.float32]
ARCHITECTURE, WEIGHTS = "architecture.json", "policy.safetensors"
FORMAT = 1
MAX_JSON = 4 * 2**20  # bytes of architecture.json, and of the header of the weights
MAX_INSTRUCTIONS, MAX_INSTRUCTION = 10_000, 2_000
MAX_WORK = 10**10  # multiplications of an inference: far more than a control period has time for
_LAYER_WORK = 10**5  # what calling a layer costs, in multiplications
_LIMITS = {
    "obs_dim": (1, 2**20),
    "action_dim": (1, 1024),
    "horizon": (1, 4096),
    "width": (1, 2**16),
    "blocks": (1, 1024),
    "time_features": (2, 2**13),
    "flow_steps": (1, 1000),
}
_SIZES = {"F32": 4, "BF16": 2}  # bytes of an element
_AGAIN = "fetch it again, or keep the last known good policy"
_EXPORT = "export the policy again with this version; the last good policy stays in use"


@dataclass(frozen=True)
class Architecture:
    """The shape of a flow policy, as its bundle says; the fields of `lwd_model.config.PolicyConfig`.

    Attributes:
        obs_dim, action_dim: D and A. horizon: H, actions in a chunk.
        instructions: the sentences it knows.
        width, blocks, kind: of its trunk. time_features: of its embedding of flow time, even.
        flow_steps: of the sampler. noise_scale: standard deviation of the noise it starts from.
    """

    obs_dim: int
    action_dim: int
    horizon: int
    instructions: tuple[str, ...]
    width: int
    blocks: int
    kind: Literal["residual", "plain"]
    time_features: int
    flow_steps: int
    noise_scale: float

    @property
    def work(self) -> int:
        """Multiplications of an inference of one chunk, about."""
        products = 2 if self.kind == "residual" else 1
        layer = max(products * self.width**2, _LAYER_WORK)
        return self.flow_steps * (self.blocks * layer + 2 * self.width * self.horizon * self.action_dim)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of such a policy and its shape, the observation's statistics included."""
        chunk, width = self.horizon * self.action_dim, self.width
        shapes: dict[str, tuple[int, ...]] = {
            "observation.mean": (self.obs_dim,),
            "observation.std": (self.obs_dim,),
            "state.weight": (width, self.obs_dim),
            "state.bias": (width,),
            "task.embedding": (len(self.instructions), width),
            "time.weight": (width, self.time_features),
            "action.weight": (width, chunk),
            "head.weight": (chunk, width),
            "head.bias": (chunk,),
        }
        for i in range(self.blocks):
            shapes |= {f"block{i}.in.weight": (width, width), f"block{i}.in.bias": (width,)}
            if self.kind == "residual":
                shapes[f"block{i}.out.weight"] = (width, width)
        return shapes


def read_architecture(bundle: Path) -> Architecture:
    """What `architecture.json` says.

    Raises:
        CorruptDataError: missing, too large, or not one JSON document. ConfigError: of another format, or a field is
            missing, unknown, of a wrong type or out of range.
    """
    path = bundle / ARCHITECTURE
    document = _json(_read(path, 0, _size(path), MAX_JSON), str(path))
    if not isinstance(document, dict) or document.get("format") != FORMAT or type(document["format"]) is not int:
        raise ConfigError(f"policy bundle {bundle} is not of format {FORMAT}", "update the robot's client")
    _known(document, {"format", "normaliser", "policy"}, f"{path}")
    digest, policy = document.get("normaliser"), document.get("policy")
    if digest is not None and not (isinstance(digest, str) and len(digest) == 64):
        raise ConfigError(f"{path}: normaliser is {_short(digest)}, not a sha256", _EXPORT)
    if not isinstance(policy, dict):
        raise ConfigError(f"{path}: policy is {_short(policy)}, not an object", _EXPORT)
    _known(policy, {one.name for one in fields(Architecture)}, f"{path}: policy")
    for one in fields(Architecture):
        if one.name not in policy:
            raise ConfigError(f"{path}: the policy bundle lacks {one.name!r}", _EXPORT)
    for name, (low, high) in _LIMITS.items():
        value = policy[name]
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{path}: {name} is {_short(value)}, not a whole number in {low}..{high}", _EXPORT)
    if policy["time_features"] % 2:
        raise ConfigError(f"{path}: time_features is {policy['time_features']}, which is odd", _EXPORT)
    if policy["kind"] not in ("residual", "plain"):
        raise ConfigError(f"{path}: kind is {_short(policy['kind'])}, neither 'residual' nor 'plain'", _EXPORT)
    noise = policy["noise_scale"]
    if type(noise) not in (int, float) or not 0 <= noise <= 100:
        raise ConfigError(f"{path}: noise_scale is {_short(noise)}, not a number in 0..100", _EXPORT)
    found = Architecture(**{**policy, "noise_scale": float(noise), "instructions": _instructions(policy, path)})
    if found.work > MAX_WORK:
        raise ConfigError(
            f"{path}: an inference of {found.flow_steps} flow steps, {found.blocks} blocks, width {found.width} takes "
            f"{found.work:.0e} multiplications, at most {MAX_WORK:.0e} are tried",
            "train a smaller policy, or with fewer flow steps",
        )
    return found


def read_tensors(bundle: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """The weights, float32: tensors stored as F32 or BF16 (bfloat16 is the upper half of a float32).

    Args:
        shapes: the tensors that must be there, and no others, each of this shape.

    Raises:
        CorruptDataError: missing, truncated, longer than its tensors, or not finite. ConfigError: a tensor is missing,
            unknown, or of another type or shape.
    """
    path = bundle / WEIGHTS
    size = _size(path)
    if size < 8:
        raise CorruptDataError(f"policy bundle {path} is truncated: {size} bytes", _AGAIN)
    (length,) = struct.unpack("<Q", _read(path, 0, 8, 8))
    if length > min(size - 8, MAX_JSON):
        raise CorruptDataError(
            f"policy bundle {path} of {size} bytes declares a header of {length}, at most {MAX_JSON} are read",
            _AGAIN,
        )
    header = _json(_read(path, 8, length, MAX_JSON), f"{path}: header")
    if not isinstance(header, dict):
        raise CorruptDataError(f"policy bundle {path}: its header is no object", _AGAIN)
    header.pop("__metadata__", None)
    for name in sorted(shapes.keys() - header.keys()):
        raise ConfigError(f"the policy bundle {path} lacks the tensor {name!r}", _EXPORT)
    _known(header, set(shapes), f"policy bundle {path}: tensors")
    spans = {name: _span(name, header[name], shape, path) for name, shape in shapes.items()}
    at = 0
    for name, (begin, end, _) in sorted(spans.items(), key=lambda item: item[1][0]):
        if begin != at:
            raise CorruptDataError(f"policy bundle {path}: {name} begins at byte {begin}, not {at}", _AGAIN)
        at = end
    if size != 8 + length + at:
        raise CorruptDataError(f"policy bundle {path} has {size} bytes, its tensors need {8 + length + at}", _AGAIN)
    tensors = {}
    for name, (begin, end, dtype) in spans.items():
        tensor = _float32(_read(path, 8 + length + begin, end - begin, end - begin), dtype).reshape(shapes[name])
        if not np.isfinite(tensor).all():
            raise CorruptDataError(
                f"policy bundle {path}: {name} is not finite", "do not deploy it; look at its training"
            )
        tensors[name] = tensor
    return tensors


def _span(name: str, entry: Any, shape: tuple[int, ...], path: Path) -> tuple[int, int, str]:
    """First and last byte of a tensor within the data, and its type."""
    where = f"policy bundle {path}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptDataError(f"{where} is described as {_short(entry)}", _AGAIN)
    dtype, stored, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ConfigError(f"{where} is of type {_short(dtype)}; a robot reads F32 and BF16", "export it as one of them")
    if stored != list(shape) or not _whole(stored):
        raise ConfigError(
            f"{where} has shape {_short(stored)}, its architecture says {list(shape)}",
            "export the policy again; weights and architecture are of different policies",
        )
    if not _whole(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
        raise CorruptDataError(f"{where} lies at the bytes {_short(offsets)}, which is not its size", _AGAIN)
    return offsets[0], offsets[1], dtype


def _float32(data: bytes, dtype: str) -> Array:
    if dtype == "F32":
        return np.frombuffer(data, "<f4").astype(np.float32)
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _instructions(policy: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    given = policy["instructions"]
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INSTRUCTIONS:
        raise ConfigError(f"{path}: instructions is {_short(given)}, not a list of 1..{MAX_INSTRUCTIONS}", _EXPORT)
    for one in given:
        if not isinstance(one, str) or not 1 <= len(one) <= MAX_INSTRUCTION:
            raise ConfigError(f"{path}: an instruction is {_short(one)}, not a sentence", _EXPORT)
    if len(set(given)) != len(given):
        raise ConfigError(f"{path}: an instruction is listed twice", _EXPORT)
    return tuple(given)


def _json(data: bytes, name: str) -> Any:
    """One JSON document: UTF-8, no key twice, no NaN."""

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice[:80]!r} stands twice")
        return found

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no JSON number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CorruptDataError(f"policy bundle: {name} cannot be read ({str(error)[:200]})", _AGAIN) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CorruptDataError(f"policy bundle {path} cannot be read ({error})", _AGAIN) from error


def _read(path: Path, at: int, size: int, cap: int) -> bytes:
    if size > cap:
        raise CorruptDataError(f"policy bundle {path} has {size} bytes, at most {cap} are read", _AGAIN)
    try:
        with open_regular(path) as handle:
            handle.seek(at)
            data = handle.read(size)
    except OSError as error:
        raise CorruptDataError(f"policy bundle {path} cannot be read ({error})", _AGAIN) from error
    if len(data) != size:
        raise CorruptDataError(f"policy bundle {path} is truncated", _AGAIN)
    return data


def _known(found: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(found.keys() - known):
        raise ConfigError(
            f"{where}: unknown {unknown[0][:80]!r}", "update the robot's client, or export the policy again"
        )


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
