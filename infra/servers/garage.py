"""Garage: an S3 server of one node, built once by cargo."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from infra.errors import ConfigError
from infra.files import write_durably
from infra.servers.server import Server
from infra.servers.toolchain import HOST, http_status, program, run

BUCKET, REGION = "lwd", "lwd"


class Garage(Server):
    """S3 with metadata and data fsynced."""

    name, wanted = "garage", "2.5.0"
    further_ports = ("admin_port", "rpc_port")

    def __init__(self, programs: Path, data: Path, port: int | None = None, objects: Path | None = None) -> None:
        """As of every server; `objects` is the folder of the objects' blocks, by default beside the metadata."""
        super().__init__(programs, data, port)
        self._objects = objects or data / "data"

    @property
    def program(self) -> Path:
        return self.programs / f"garage-{self.wanted}" / "bin" / "garage"

    @property
    def prepared(self) -> bool:
        return self.program.exists()

    def obtain(self) -> None:
        """Ten minutes or more on two cores; cargo shows its progress, and goes on where it was interrupted."""
        cargo = program("cargo", "Garage needs cargo, once", "install Rust, or set LWD_S3_ENDPOINT to an S3 you have")
        root = self.program.parents[1]
        argv = [cargo, "install", "garage", "--version", self.wanted, "--locked", "--root", str(root)]
        # Link-time optimisation would double the time and change nothing that is measured here.
        env = {"CARGO_PROFILE_RELEASE_LTO": "off", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16"}
        env |= {"CARGO_PROFILE_RELEASE_OPT_LEVEL": "2", "CARGO_TARGET_DIR": str(root / "build")}
        done = subprocess.run(argv, env={**os.environ, **env}, check=False)
        if done.returncode:
            raise ConfigError(
                f"building Garage failed (cargo ended with {done.returncode}); its messages are above",
                "see that cargo reaches its registry and that there are 4 GB of disk, then run it again",
            )
        shutil.rmtree(root / "build", ignore_errors=True)

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self._configure()
        names = {"GARAGE_DEFAULT_ACCESS_KEY": self.access_key, "GARAGE_DEFAULT_SECRET_KEY": self.secret_key}
        argv = [str(self.program), "-c", str(self._config), "server", "--single-node", "--default-bucket"]
        return argv, {**names, "GARAGE_DEFAULT_BUCKET": BUCKET, "RUST_LOG": "garage=warn"}

    def ready(self) -> bool:
        """Whether its one node has its layout, and S3 is served: it calls itself healthy without, too."""
        if self.pid is None:
            return False
        healthy = f"http://{HOST}:{self.named_port('admin_port')}/health"
        return http_status(healthy) == 200 and http_status(self.endpoint) == 403  # without a signature

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def access_key(self) -> str:
        return self._secret("access_key", lambda: "GK" + secrets.token_hex(12))

    @property
    def secret_key(self) -> str:
        return self._secret("secret_key", lambda: secrets.token_hex(32))

    def create_bucket(self, name: str) -> None:
        """A further bucket that the same key may use."""
        cli = [str(self.program), "-c", str(self._config), "bucket"]
        fix = "see that Garage runs: `lwd servers status`"
        run([*cli, "create", name], f"making bucket {name}", fix=fix)
        allow = ["allow", "--read", "--write", "--owner", name, "--key", self.access_key]
        run([*cli, *allow], f"opening bucket {name}", fix=fix)

    @property
    def _config(self) -> Path:
        return self.data / "garage.toml"

    def _secret(self, name: str, make: Callable[[], str]) -> str:
        path = self.data / name
        if not path.exists():
            write_durably(self.folder() / name, make().encode(), mode=0o600)
        return path.read_text()

    def _configure(self) -> None:
        text = f"""
metadata_dir = "{self.data / "meta"}"
data_dir = "{self._objects}"
db_engine = "sqlite"
metadata_fsync = true
data_fsync = true
replication_factor = 1
rpc_bind_addr = "{HOST}:{self.named_port("rpc_port")}"
rpc_public_addr = "{HOST}:{self.named_port("rpc_port")}"
rpc_secret = "{self._secret("rpc_secret", lambda: secrets.token_hex(32))}"

[s3_api]
s3_region = "{REGION}"
api_bind_addr = "{HOST}:{self.port}"

[admin]
api_bind_addr = "{HOST}:{self.named_port("admin_port")}"
admin_token = "{self._secret("admin_token", lambda: secrets.token_urlsafe(32))}"
"""
        write_durably(self._config, text.encode(), mode=0o600)
