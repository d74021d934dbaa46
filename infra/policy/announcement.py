"""A signed statement that a cohort's robots are to run a policy version: what a robot acts upon."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from infra.policy.permission import a_mapping, a_text, a_time, a_whole

Kind = Literal["publish", "promote", "rollback"]


@dataclass(frozen=True)
class Announcement:
    """One statement to one cohort. Until when it may be run is another one's: `infra.policy.permission`.

    Attributes:
        seq: position in the deployment's one sequence of announcements; within an epoch a robot never goes back in it.
        cohort: `learning`, `canary` or `production`.
        version: the policy to run.
        kind: `publish` and `promote` only lead to higher versions; `rollback` alone may name a lower one.
        manifest_sha256: digest of the manifest, so that the approval binds to the artifact and not to its number.
        created_at: the catalog's clock, seconds since the epoch.
        signature: ed25519, over everything above and the epoch.
        epoch: how many resets came before; a robot takes announcements of its own epoch alone.
    """

    seq: int
    cohort: str
    version: int
    kind: Kind
    manifest_sha256: str
    created_at: float
    signature: str = ""
    epoch: int = 0

    def statement(self) -> dict[str, Any]:
        """As the JSON document that is signed; before any reset, the one that was signed before there were epochs."""
        fields = asdict(self)
        del fields["signature"]
        if not self.epoch:
            del fields["epoch"]
        return {"type": "lwd-policy-announcement", **fields}

    @classmethod
    def parse(cls, document: object) -> Announcement:
        """From what a server said; types and ranges only, the signature is the subscriber's affair.

        Raises:
            ValueError: it is none.
        """
        given = a_mapping(document)
        kind = given.get("kind")
        if kind not in get_args(Kind):
            raise ValueError("an announcement of an unknown kind")
        return cls(
            seq=a_whole(given, "seq", 2**63 - 1),
            cohort=a_text(given, "cohort", 32),
            version=a_whole(given, "version", 2**31),
            kind=cast(Kind, kind),
            manifest_sha256=a_text(given, "manifest_sha256", 64),
            created_at=a_time(given, "created_at"),
            signature=a_text(given, "signature", 200),
            epoch=a_whole({"epoch": 0} | dict(given), "epoch", 2**31),
        )


def bundle_prefix(manifest_sha256: str) -> str:
    """Where a policy's objects lie in the store: content-addressed, so that no later publish can change them."""
    return f"policies/{manifest_sha256}"


def base_key(sha256: str) -> str:
    """Where the base that policies are bound to lies: once for all of them."""
    return f"policies/bases/{sha256}/base.safetensors"
