"""What a signed bundle can hold and a robot does not expect: refused by name when it is loaded, or it simply runs."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from infra.edge.inference import Embodiment, load_policy
from infra.errors import ConfigError, LwdError

D, A, H, WIDTH = 6, 2, 3, 8
POLICY: dict[str, Any] = {"obs_dim": D, "action_dim": A, "horizon": H, "instructions": ["a", "b"], "width": WIDTH,
                          "blocks": 2, "kind": "residual", "time_features": 4, "flow_steps": 3,
                          "noise_scale": 0.5}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "observation.mean": (D,), "observation.std": (D,), "state.weight": (WIDTH, D), "state.bias": (WIDTH,),
        "task.embedding": (2, WIDTH), "time.weight": (WIDTH, 4), "action.weight": (WIDTH, H * A),
        "head.weight": (H * A, WIDTH), "head.bias": (H * A,),
    }  # fmt: skip
    for i in range(2):
        found |= {f"block{i}.in.weight": (WIDTH, WIDTH), f"block{i}.in.bias": (WIDTH,)}
        found |= {f"block{i}.out.weight": (WIDTH, WIDTH)}
    return found


def bundle(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes().items()}
    tensors["observation.std"] = np.ones(D, np.float32)
    save_file(tensors, folder / "policy.safetensors")
    write(folder, {"format": 1, "policy": POLICY, "normaliser": "0" * 64})
    return folder


def write(folder: Path, document: Any) -> None:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "architecture.json").write_text(text)


def act(folder: Path) -> np.ndarray:
    rng = np.random.default_rng(1)
    observations, noise = rng.normal(size=(4, D)).astype(np.float32), rng.normal(size=(4, H, A)).astype(np.float32)
    return load_policy(folder).act(observations, ["a", "b", "a", "b"], noise)


def bfloat16(folder: Path, names: set[str] | None = None) -> None:
    """Store tensors as the upper halves of their float32."""
    header, data = {}, b""
    for name, tensor in load_file(folder / "policy.safetensors").items():
        whole = names is not None and name not in names
        raw = tensor.tobytes() if whole else (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "F32" if whole else "BF16", "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    raw_header = json.dumps(header).encode()
    (folder / "policy.safetensors").write_bytes(struct.pack("<Q", len(raw_header)) + raw_header + data)


@pytest.mark.parametrize("names", [None, {"state.weight", "head.bias"}])
def test_a_policy_in_bfloat16_runs(tmp_path: Path, names: set[str] | None) -> None:
    folder = bundle(tmp_path / "b")
    expected = act(folder)
    bfloat16(folder, names)
    np.testing.assert_allclose(act(folder), expected, atol=0.05)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, np.bool_])
def test_another_type_is_named(tmp_path: Path, dtype: type) -> None:
    folder = bundle(tmp_path / "b")
    tensors = load_file(folder / "policy.safetensors")
    save_file(tensors | {"head.bias": tensors["head.bias"].astype(dtype)}, folder / "policy.safetensors")
    with pytest.raises(LwdError, match=r"head\.bias is of type"):
        load_policy(folder)


@pytest.mark.parametrize("name", sorted(shapes()))
@pytest.mark.parametrize("how", ["missing", "transposed", "longer", "scalar", "nan", "inf"])
def test_each_tensor_has_its_shape_and_is_finite(tmp_path: Path, name: str, how: str) -> None:
    folder = bundle(tmp_path / "b")
    tensors = load_file(folder / "policy.safetensors")
    tensor = tensors.pop(name)
    changed: dict[str, Callable[[], np.ndarray]] = {
        "transposed": lambda: np.ascontiguousarray(tensor.T)[None],
        "longer": lambda: np.concatenate([tensor, tensor[:1]]),
        "scalar": lambda: np.array(1, np.float32),
        "nan": lambda: np.full_like(tensor, np.nan),
        "inf": lambda: np.full_like(tensor, np.inf),
    }
    save_file(tensors if how == "missing" else tensors | {name: changed[how]()}, folder / "policy.safetensors")
    with pytest.raises(LwdError, match=name):
        load_policy(folder)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    tensors = load_file(folder / "policy.safetensors")
    save_file(tensors | {"block2.in.bias": np.zeros(WIDTH, np.float32)}, folder / "policy.safetensors")
    with pytest.raises(LwdError, match=r"block2\.in\.bias"):
        load_policy(folder)


WRONG = [None, -1, 0, 1e300, 2.5, True, "5", [], {}, 10**30]


@pytest.mark.parametrize("field", sorted(POLICY))
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_field_of_the_architecture_is_named(tmp_path: Path, field: str, value: Any) -> None:
    if (field, value) == ("noise_scale", 0) or (field == "noise_scale" and value == 2.5):
        return
    folder = bundle(tmp_path / "b")
    write(folder, {"format": 1, "policy": POLICY | {field: value}, "normaliser": "0" * 64})
    with pytest.raises(LwdError, match="instruction" if field == "instructions" else field):
        load_policy(folder)


@pytest.mark.parametrize(
    "document",
    [
        "", "[]", "null", "{", '"x"', '{"format": 1}', '{"format": true, "policy": {}}', "[" * 100_000, "NaN",
        {"format": 1, "policy": {}}, {"format": 1, "policy": POLICY | {"surprise": 1}},
        {"format": "1", "policy": POLICY},
        {"format": 1, "policy": POLICY, "code": "import os"}, {"format": 1, "policy": POLICY, "normaliser": 3},
        {"format": 1, "policy": {k: v for k, v in POLICY.items() if k != "width"}},
        json.dumps({"format": 1, "policy": POLICY}).replace('"width": 8', '"width": 8, "width": 8'),
        json.dumps({"format": 1, "policy": POLICY}).replace("0.5", "NaN"),
        json.dumps({"format": 1, "policy": POLICY}).replace("0.5", "9" * 5000),
        {"format": 1, "policy": POLICY | {"instructions": ["a", "a"]}},
        {"format": 1, "policy": POLICY | {"instructions": ["a", 3]}},
        {"format": 1, "policy": POLICY | {"instructions": ["a", ""]}},
        {"format": 1, "policy": POLICY | {"instructions": "ab"}},
        {"format": 1, "policy": POLICY | {"time_features": 5}},
        {"format": 1, "policy": POLICY | {"kind": "transformer"}},
    ],
    ids=lambda document: str(document)[:40],
)  # fmt: skip
def test_an_odd_architecture_is_refused(tmp_path: Path, document: Any) -> None:
    folder = bundle(tmp_path / "b")
    write(folder, document)
    with pytest.raises(LwdError):
        load_policy(folder)


def test_an_architecture_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    (folder / "architecture.json").write_bytes(b'{"format": 1, "\xff": 2}')
    with pytest.raises(LwdError, match="cannot be read"):
        load_policy(folder)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**22 + 1, 10**6])
def test_a_huge_declared_header_is_refused_unread(tmp_path: Path, length: int) -> None:
    folder = bundle(tmp_path / "b")
    (folder / "policy.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(LwdError, match="header"):
        load_policy(folder)


@pytest.mark.parametrize(
    "change",
    [{"flow_steps": 1000, "blocks": 1024}, {"flow_steps": 1000, "width": 2**16}, {"blocks": 1024, "width": 2**13},
     {"flow_steps": 1000, "horizon": 4096, "action_dim": 1024}],
)  # fmt: skip
def test_a_policy_that_takes_hours_for_an_action_is_refused_before_it_is_tried(
    tmp_path: Path, change: dict[str, int]
) -> None:
    bundle(tmp_path)
    document = json.loads((tmp_path / "architecture.json").read_text())
    document["policy"] |= change
    (tmp_path / "architecture.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="multiplications"):
        load_policy(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["architecture.json", "policy.safetensors"])
def test_a_pipe_in_a_files_place_keeps_nobody_waiting(tmp_path: Path, name: str) -> None:
    bundle(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(LwdError):
        load_policy(tmp_path)


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_statistics_that_divide_by_nothing_are_refused(tmp_path: Path, std: float) -> None:
    folder = bundle(tmp_path / "b")
    tensors = load_file(folder / "policy.safetensors")
    tensors["observation.std"][1] = std
    save_file(tensors, folder / "policy.safetensors")
    with pytest.raises(LwdError, match="std"):
        load_policy(folder)


def test_finite_weights_that_give_no_finite_actions_are_refused(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    tensors = load_file(folder / "policy.safetensors")
    tensors["head.weight"][:] = 3e38
    tensors["head.bias"][:] = -3e38
    tensors["action.weight"][:] = 3e38
    save_file(tensors, folder / "policy.safetensors")
    with pytest.raises(LwdError, match="not finite"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("embodiment", "named"),
    [(Embodiment(D + 1, A), "7-D"), (Embodiment(D, A + 1), "3-D"), (Embodiment(D, A, ("a", "c")), "'c'")],
)
def test_a_policy_of_another_embodiment_is_refused(tmp_path: Path, embodiment: Embodiment, named: str) -> None:
    folder = bundle(tmp_path / "b")
    assert load_policy(folder, embodiment=Embodiment(D, A, ("b",))).horizon == H
    with pytest.raises(LwdError, match=named):
        load_policy(folder, embodiment=embodiment)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_runs_and_raises_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = bundle(tmp_path_factory.mktemp("b"))
    path = folder / data.draw(st.sampled_from(["policy.safetensors", "architecture.json"]))
    raw = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", raw[:8])[0] if path.suffix == ".safetensors" else len(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    with contextlib.suppress(LwdError):
        assert np.isfinite(act(folder)).all()
