"""A signed statement that a cohort's robots are to run a policy version: what a robot acts upon."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["publish", "promote", "rollback"]


@dataclass(frozen=True)
class Announcement:
    """One statement to one cohort.

    Attributes:
        seq: position in the deployment's one sequence of announcements; a robot never goes back in it.
        cohort: `learning`, `canary` or `production`.
        version: the policy to run.
        kind: `publish` and `promote` only lead to higher versions; `rollback` alone may name a lower one.
        manifest_sha256: digest of the manifest, so that the approval binds to the artifact and not to its number.
        created_at: the catalog's clock, seconds since the epoch; for latencies, never compared.
        signature: ed25519, over everything above.
    """

    seq: int
    cohort: str
    version: int
    kind: Kind
    manifest_sha256: str
    created_at: float
    signature: str = ""

    def statement(self) -> dict[str, Any]:
        """As the JSON document that is signed."""
        fields = asdict(self)
        del fields["signature"]
        return {"type": "lwd-policy-announcement", **fields}


def bundle_prefix(manifest_sha256: str) -> str:
    """Where a policy's objects lie in the store: content-addressed, so that no later publish can change them."""
    return f"policies/{manifest_sha256}"


def base_key(sha256: str) -> str:
    """Where the base that policies are bound to lies: once for all of them."""
    return f"policies/bases/{sha256}/base.safetensors"
