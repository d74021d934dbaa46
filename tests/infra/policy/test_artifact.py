"""A policy is believed only when signature, manifest and every file hold (row 31)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import make_base, make_bundle

from infra.errors import ConfigError, UntrustedPolicyError
from infra.policy.artifact import BASE, MANIFEST, SIGNATURE, FileEntry, Manifest, file_sha256, seal, verify
from infra.policy.keys import Signer, create_keys, load_signer, load_trusted


def sealed(root: Path, version: int = 3) -> tuple[Path, Signer]:
    signer = create_keys(root / "keys")
    bundle = make_bundle(root / "bundle")
    seal(bundle, signer, version=version, parent=2, snapshot_version=7, cohort="learning")
    return bundle, signer


def test_a_sealed_bundle_verifies(tmp_path: Path) -> None:
    bundle, _ = sealed(tmp_path)
    manifest = verify(bundle, load_trusted(tmp_path / "keys"))
    assert (manifest.version, manifest.parent, manifest.snapshot_version) == (3, 2, 7)
    assert set(manifest.files) == {"policy.safetensors", "architecture.json"}
    assert manifest.architecture_sha256 == manifest.files["architecture.json"].sha256


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_or_missing_byte_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("artifact")
    bundle, _ = sealed(root)
    trust = load_trusted(root / "keys")
    name = data.draw(st.sampled_from(["policy.safetensors", "architecture.json", MANIFEST, SIGNATURE]))
    content = (bundle / name).read_bytes()
    at = int(data.draw(st.floats(0, 1, exclude_max=True)) * len(content))
    if data.draw(st.booleans()):
        changed = content[:at]
    else:
        changed = content[:at] + bytes([content[at] ^ data.draw(st.sampled_from([1, 4, 64]))]) + content[at + 1 :]
    (bundle / name).write_bytes(changed)
    with pytest.raises(UntrustedPolicyError):
        verify(bundle, trust)


@pytest.mark.parametrize("name", ["policy.safetensors", "architecture.json", MANIFEST, SIGNATURE])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    bundle, _ = sealed(tmp_path)
    (bundle / name).unlink()
    with pytest.raises(UntrustedPolicyError):
        verify(bundle, load_trusted(tmp_path / "keys"))


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    bundle, signer = sealed(tmp_path)
    (bundle / "payload.pkl").write_bytes(b"x")
    with pytest.raises(UntrustedPolicyError, match=r"payload\.pkl"):
        verify(bundle, load_trusted(tmp_path / "keys"))
    with pytest.raises(ConfigError, match=r"payload\.pkl"):
        seal(bundle, signer, version=4, parent=3, snapshot_version=0, cohort="learning")


def test_another_key_is_refused(tmp_path: Path) -> None:
    bundle, _ = sealed(tmp_path / "theirs")
    create_keys(tmp_path / "ours")
    with pytest.raises(UntrustedPolicyError, match="unknown key"):
        verify(bundle, load_trusted(tmp_path / "ours"))


def test_a_manifest_cannot_name_a_file_outside_the_bundle(tmp_path: Path) -> None:
    bundle, _ = sealed(tmp_path)
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"]["../../evil.json"] = document["files"]["architecture.json"]
    with pytest.raises(UntrustedPolicyError, match="evil"):
        Manifest.parse(json.dumps(document).encode(), "manifest")


def test_a_manifest_signed_before_there_were_bases_still_holds(tmp_path: Path) -> None:
    bundle, signer = sealed(tmp_path)
    document = json.loads((bundle / MANIFEST).read_text())
    assert "base" not in document  # what is signed without a base is byte for byte what it always was
    manifest = verify(bundle, load_trusted(tmp_path / "keys"))
    assert manifest.base is None
    assert manifest.digest == hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    names = ("type", "version", "parent", "snapshot_version", "cohort", "architecture_sha256", "normaliser_sha256")
    old = {name: document[name] for name in (*names, "files", "created_at")}
    assert signer.sign(old) == (bundle / SIGNATURE).read_text()


def test_a_policy_is_bound_to_its_base(tmp_path: Path) -> None:
    signer, bundle = create_keys(tmp_path / "keys"), make_bundle(tmp_path / "bundle")
    base = make_base(tmp_path / "base.safetensors")
    entry = FileEntry(file_sha256(base), base.stat().st_size)
    options = {"version": 1, "parent": None, "snapshot_version": 0, "cohort": "learning"}
    seal(bundle, signer, **options, base=entry)  # type: ignore[arg-type]
    trust = load_trusted(tmp_path / "keys")
    with pytest.raises(UntrustedPolicyError, match=r"missing or foreign files: base\.safetensors"):
        verify(bundle, trust)
    shutil.copy(base, bundle / BASE)
    manifest = verify(bundle, trust)
    assert manifest.base is not None and manifest.base.sha256 == entry.sha256 and BASE not in manifest.files
    seal(bundle, signer, **options, base=entry)  # type: ignore[arg-type]  # a fetched bundle, published again
    for other in (make_base(tmp_path / "other.safetensors", seed=1).read_bytes(), base.read_bytes()[:-1]):
        (bundle / BASE).write_bytes(other)
        with pytest.raises(UntrustedPolicyError, match=r"base\.safetensors"):
            verify(bundle, trust)
        with pytest.raises(ConfigError, match="not the base of this policy"):
            seal(bundle, signer, **options, base=entry)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "base",
    [
        {"name": "base.safetensors", "sha256": "../../../" + "0" * 55, "size": 4},
        {"name": "base.safetensors", "sha256": "0" * 64, "size": 0},
        {"name": "base.safetensors", "sha256": "0" * 64, "size": 2**40},
        {"name": "../base.safetensors", "sha256": "0" * 64, "size": 4},
        {"name": "base.safetensors"},
        "base.safetensors",
    ],
)
def test_a_manifest_cannot_name_a_base_that_none_may_be(tmp_path: Path, base: object) -> None:
    bundle, _ = sealed(tmp_path)
    document = json.loads((bundle / MANIFEST).read_text()) | {"base": base}
    with pytest.raises(UntrustedPolicyError):
        Manifest.parse(json.dumps(document).encode(), "manifest")


def test_sealing_needs_weights_and_a_known_cohort(tmp_path: Path) -> None:
    bundle, signer = sealed(tmp_path)
    with pytest.raises(ConfigError, match="unknown cohort 'all'"):
        seal(bundle, signer, version=4, parent=3, snapshot_version=0, cohort="all")
    (bundle / "policy.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks policy\.safetensors"):
        seal(bundle, signer, version=4, parent=3, snapshot_version=0, cohort="learning")


def test_keys_are_made_once_and_kept_private(tmp_path: Path) -> None:
    first, second = create_keys(tmp_path), create_keys(tmp_path)
    assert first.key_id == second.key_id == load_signer(tmp_path).key_id
    assert (tmp_path / "signing.pem").stat().st_mode & 0o777 == 0o600
    assert [path.stem for path in (tmp_path / "trusted").glob("*.pub")] == [first.key_id]


def test_bad_keys_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trusted key"):
        load_trusted(tmp_path)
    create_keys(tmp_path)
    (tmp_path / "signing.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"signing\.pem cannot be read"):
        load_signer(tmp_path)
    (public,) = (tmp_path / "trusted").glob("*.pub")
    public.rename(public.with_name("0123456789abcdef.pub"))
    with pytest.raises(ConfigError, match="name the file by the key"):
        load_trusted(tmp_path)
