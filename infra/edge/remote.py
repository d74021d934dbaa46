"""The robot's server over HTTP: all that a robot needs is a URL and a token.

Episodes go to the place that the service names: the store, by a presigned URL, or the service itself. Then they are
committed, several at once. Every call may be repeated.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from infra.crashpoints import crashpoint
from infra.edge.server import STATUSES, Heartbeat, Latency, RobotServer, Status, Upload, from_wire
from infra.edge.transport import WAIT, LaterError, Transport, checked_url, store_error
from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.policy.announcement import Announcement
from infra.policy.permission import Permissions
from infra.policy.subscriber import MAX_NEWS
from infra.settings import Settings

_TOKEN = re.compile(r"[0-9a-f]{16}\.[A-Za-z0-9_-]{43}")
_POLICY = re.compile(r"policies/([0-9a-f]{64})/([a-z0-9_]+\.(?:safetensors|json|sig))")
_BASE = re.compile(r"policies/bases/([0-9a-f]{64})/base\.safetensors")
_MAX_OBJECT_BYTES = 2**28  # of what is fetched into memory
_MAX_PAGES, _MAX_NEWS_S = 64, 30.0  # of announcements at once; what is beyond waits for the next time
_BLOCK = 2**18


class RemoteServer(RobotServer):
    """One robot's port to the ingest service. Threads may share it.

    Args:
        url: of the service, `https://host:port`; `http` only to this machine, unless `insecure`.
        token: the robot's.
        robot_id, cohort: what this robot is configured to be; the service refuses a token that is another one's.
        ca: PEM bundle that is believed besides the system's.
        insecure: let the token travel in the clear.
        timeout_s: to connect, and without a byte, seconds; a store may take three times as long for an upload.
        tries: of one request.

    Raises:
        ConfigError: URL, token or `ca` cannot be used.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        robot_id: str | None = None,
        cohort: str | None = None,
        ca: Path | None = None,
        insecure: bool = False,
        timeout_s: float = 10.0,
        tries: int = 3,
    ) -> None:
        self._url = checked_url(url, insecure)
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                "the robot's token is malformed", "set LWD_ROBOT_TOKEN to what `lwd robots enrol` printed"
            )
        self._headers = {"Authorization": f"Bearer {token}"}
        self._headers |= {"LWD-Robot": robot_id} if robot_id else {}
        self._headers |= {"LWD-Cohort": cohort} if cohort else {}
        self._http = Transport(urlsplit(self._url).netloc, ca, timeout_s, tries)
        self._not_before = 0.0  # of the next upload, by the monotonic clock

    @classmethod
    def from_settings(cls, settings: Settings, robot_id: str, cohort: str) -> RemoteServer:
        """For the robot of these settings.

        Raises:
            ConfigError: `ingest_url` or `robot_token` is missing, or cannot be used.
        """
        if settings.ingest_url is None or settings.robot_token is None:
            raise ConfigError(
                f"robot {robot_id} has no token for the service",
                f"run `lwd robots enrol {robot_id}` on the server and set LWD_ROBOT_TOKEN here, LWD_INGEST_URL too",
            )
        return cls(
            settings.ingest_url, settings.robot_token.get_secret_value(), robot_id=robot_id, cohort=cohort,
            ca=settings.ingest_ca, insecure=settings.ingest_insecure,
        )  # fmt: skip

    def statuses(self, episodes: Sequence[tuple[str, str]]) -> list[Status]:
        asked = [{"episode_id": episode_id, "sha256": sha256} for episode_id, sha256 in episodes]
        found = self._json("POST", "/v1/episodes/status", {"episodes": asked}).get("statuses")
        if not isinstance(found, list) or len(found) != len(asked) or not set(map(str, found)) <= set(STATUSES):
            raise self._nonsense("statuses")
        return cast(list[Status], found)

    def submit_many(self, uploads: Sequence[Upload]) -> list[Status | LwdError]:
        if (wait := self._not_before - time.monotonic()) > 0:
            raise UnavailableError(f"{self._http.where} asked to be left alone for another {wait:.0f} s", WAIT)
        named = [{"episode_id": u.episode_id, "sha256": u.sha256, "size": u.size} for u in uploads]
        places = self._items("/v1/uploads", named)
        outcomes: list[Status | LwdError] = [_outcome(place, self._nonsense("a place")) for place in places]
        placed, away = [], None
        for number, (upload, place) in enumerate(zip(uploads, places, strict=True)):
            if not (isinstance(place.get("key"), str) and isinstance(place.get("url"), str)):
                continue
            if away is None:
                try:
                    self._place(upload, place["url"])
                    placed.append(number)
                    continue
                except (UnavailableError, StorageFullError) as error:  # so it would be with the others
                    away = error
                except (LwdError, OSError) as error:
                    outcomes[number] = error if isinstance(error, LwdError) else _unreadable(upload, error)
                    continue
            outcomes[number] = away
        if placed:
            items = [
                {**named[number], "key": places[number]["key"], "meta": dict(uploads[number].meta)} for number in placed
            ]
            try:
                done = [_outcome(item, self._nonsense("an outcome")) for item in self._items("/v1/episodes", items)]
            except LwdError as error:
                done = [error] * len(placed)
            crashpoint("remote.committed")
            for number, outcome in zip(placed, done, strict=True):
                outcomes[number] = outcome
        return outcomes

    def announcements(self, cohort: str, after: int) -> Sequence[Announcement]:
        found: list[Announcement] = []
        after = min(after, 2**62 - 1)  # what the service takes; a number beyond was signed in error
        end = time.monotonic() + _MAX_NEWS_S
        for _ in range(_MAX_PAGES):
            answer = self._json("GET", f"/v1/announcements?after={after}")
            documents = answer.get("announcements")
            try:
                if not isinstance(documents, list):
                    raise ValueError("no list")
                page = [Announcement.parse(document) for document in documents[:MAX_NEWS]]
            except (ValueError, RecursionError) as error:
                raise self._nonsense("announcements") from error
            numbers = [after, *(said.seq for said in page)]
            if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
                raise self._nonsense("announcements again, or out of order,")
            found += page
            if not page or not answer.get("more") or len(found) >= MAX_NEWS or time.monotonic() > end:
                break
            after = page[-1].seq
        if any(said.cohort != cohort for said in found):
            raise ConfigError(f"the token is not of cohort {cohort}", "enrol the robot for the cohort that it follows")
        return found[:MAX_NEWS]

    def permissions(self, cohort: str) -> Permissions:
        answer = self._json("GET", "/v1/permissions", tries=2)
        try:
            found = Permissions.parse(answer)
        except (ValueError, RecursionError) as error:
            raise self._nonsense("permissions") from error
        if any(said.cohort != cohort for said in found.permissions):
            raise ConfigError(f"the token is not of cohort {cohort}", "enrol the robot for the cohort that it follows")
        return found

    def fetch(self, key: str) -> bytes:
        sink = io.BytesIO()
        self._download(key, sink, _MAX_OBJECT_BYTES, 0)
        return sink.getvalue()

    def fetch_to(self, key: str, path: Path, most: int) -> None:
        """Write an object to a file, block by block; see `infra.policy.bases.StreamingSource`."""
        with path.open("wb") as sink:
            self._download(key, sink, most, most)
            sink.flush()
            os.fsync(sink.fileno())

    def heartbeat(self, beat: Heartbeat) -> None:
        body = {"active_version": beat.active_version, "staged_version": beat.staged_version}
        self._json("POST", "/v1/heartbeat", {**body, "episodes": beat.episodes, "details": dict(beat.details)}, tries=2)

    def measure(self, name: Latency, version: int, since: float) -> None:
        self._json("POST", "/v1/measurements", {"name": name, "version": version, "since": since}, tries=2)

    def close(self) -> None:
        self._http.close()

    # One request

    def _items(self, path: str, items: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
        """The answers for several episodes, in order."""
        try:
            found = self._json("POST", path, {"episodes": items}).get("episodes")
        except LaterError as error:
            self._not_before = time.monotonic() + error.after
            raise
        if not isinstance(found, list) or len(found) != len(items) or not all(isinstance(item, dict) for item in found):
            raise self._nonsense("episodes")
        return found

    def _json(self, method: str, path: str, body: object = None, tries: int | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})

        def ask() -> dict[str, Any]:
            response = self._http.request(method, self._url + path, headers, data)
            answer = self._http.read(response)
            if response.status >= 300:
                raise self._http.error(response, answer)
            if response.status == 204:
                return {}
            if not isinstance(answer, dict):
                raise self._nonsense("no JSON object")
            return answer

        return self._http.patiently(ask, tries)

    def _place(self, upload: Upload, url: str) -> None:
        """PUT an episode's bytes where the service said: itself, with the token, or the store, without it."""
        own = url.startswith("/")
        size = upload.data.stat().st_size if isinstance(upload.data, Path) else len(upload.data)
        if size != upload.size:
            raise CorruptDataError(
                f"episode {upload.episode_id} has {size} bytes, not {upload.size}", "look at its file"
            )
        headers = {"Content-Length": str(size)} | (self._headers if own else {})

        def send() -> None:
            with upload.data.open("rb") if isinstance(upload.data, Path) else io.BytesIO(upload.data) as source:
                response = self._http.request("PUT", self._url + url if own else url, headers, source, slow=True)
            answer = self._http.read(response)
            if response.status not in (200, 201, 204):
                raise self._http.error(response, answer) if own else store_error(response)

        self._http.patiently(send, size=size)
        crashpoint("remote.uploaded")

    def _download(self, key: str, sink: IO[bytes], most: int, size: int) -> None:
        """Write an object of at most `most` bytes, about `size` of them, into the sink."""
        if found := _POLICY.fullmatch(key):
            path = f"/v1/policies/objects/{found[1]}/{found[2]}"
        elif found := _BASE.fullmatch(key):
            path = f"/v1/policies/bases/{found[1]}"
        else:
            raise ConfigError(f"{key[:120]!r} is no policy's object", "fetch what the manifest names")

        def get() -> None:
            sink.seek(0)
            sink.truncate()
            response = self._http.request("GET", self._url + path, self._headers)
            try:
                if response.status == 307:  # to the store, which must not see the token; from there, nowhere else
                    response.close()
                    response = self._http.request("GET", response.headers.get("Location", ""), {})
                    if response.status != 200:
                        raise _absent(key) if response.status == 404 else store_error(response)
                if response.status != 200:
                    raise self._http.error(response, self._http.read(response))
                if (response.length_remaining or 0) > most:
                    raise _too_large(key, most)
                # Not stream(): its lines between chunks have no limit, http.client's have.
                while block := response.read(_BLOCK):
                    if sink.tell() + len(block) > most:
                        raise _too_large(key, most)
                    sink.write(block)
            except BaseException:
                response.close()  # what is unread has perhaps no end, and is no other answer's beginning
                raise
            response.release_conn()

        self._http.patiently(get, size=size)

    def _nonsense(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"{self._http.where} answered {what} in a form that this robot does not know", "update it"
        )


def _absent(key: str) -> CorruptDataError:
    return CorruptDataError(f"{key} is not in the store", "publish the policy again")


def _too_large(key: str, most: int) -> CorruptDataError:
    return CorruptDataError(f"{key} has more than {most} bytes", "publish the policy again, or a smaller one")


def _unreadable(upload: Upload, error: OSError) -> LwdError:
    return CorruptDataError(
        f"episode {upload.episode_id} cannot be read ({error.strerror})", "look at the spool's disk"
    )


def _outcome(item: Mapping[str, Any], nonsense: UnavailableError) -> Status | LwdError:
    """The status or the error of one episode; `nonsense` where it is neither, for example a place."""
    if item.get("status") in STATUSES:
        return cast(Status, item["status"])
    return from_wire(item.get("error")) or nonsense
