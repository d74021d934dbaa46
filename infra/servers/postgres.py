"""PostgreSQL, from the server programs of the system's package, as a user other than root."""

from __future__ import annotations

import functools
import os
import pwd
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import psycopg
from psycopg import sql

from infra.errors import ConfigError
from infra.files import write_durably
from infra.servers.server import Server
from infra.servers.toolchain import HOST, run

USER = "lwd"
DATABASES = ("lwd", "prefect")
_OLDEST = 15
_PROGRAMS = ("initdb", "postgres")
_PACKAGED = ("lib/postgresql/*/bin", "pgsql-*/bin")


class Postgres(Server):
    """One cluster on loopback, with passwords."""

    name, wanted = "postgres", f"{_OLDEST} or newer"
    folder_mode = 0o711  # it may run as another user, who must reach the cluster in it
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint

    @property
    def prepared(self) -> bool:
        return bool(installations())

    def obtain(self) -> None:
        """Debian's package, for root; others are told to install it."""
        apt = shutil.which("apt-get")
        if os.geteuid() == 0 and apt is not None:
            fix, env = "install PostgreSQL's server programs by hand", {"DEBIAN_FRONTEND": "noninteractive"}
            install = [apt, "install", "-y", "--no-install-recommends", "postgresql"]
            run([apt, "update"], "looking for PostgreSQL's package", fix=fix, env=env)
            run(install, "installing PostgreSQL", fix=fix, env=env)
        self._program("initdb")

    @property
    def version(self) -> str:
        found = self._installed()
        return release(found) if found is not None else self.wanted

    def initialise(self) -> None:
        if self._cluster.exists():
            self._unlock()
            return
        owner, partial = self.user(), self._cluster.with_name("cluster.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a start that was interrupted
        partial.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w", suffix=".password") as password:
            password.write(self.password)
            password.flush()
            if owner is not None:
                shutil.chown(partial, owner, pwd.getpwnam(owner).pw_gid)
                shutil.chown(password.name, owner)
            argv = [self._program("initdb"), "-D", str(partial), "-U", USER, "--auth=scram-sha-256", "--encoding=UTF8"]
            argv += [f"--pwfile={password.name}", "--no-locale"]
            fix = f"see that {owner or 'this user'} can enter the folders above {partial}, and that there is room"
            run(argv, "making PostgreSQL's cluster", fix=fix, user=owner)
        partial.rename(self._cluster)

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        options = {"listen_addresses": HOST, "port": str(self.port), "unix_socket_directories": ""}
        options |= {"max_connections": "200", "shared_buffers": "128MB"}
        pairs = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", str(self._cluster), *pairs], {}

    def ready(self) -> bool:
        if self.pid is None:
            return False
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def settle(self) -> None:
        for name in DATABASES:
            self.create_database(name)

    def create_database(self, name: str) -> None:
        """Make a database unless it is there."""
        with self._connect("postgres") as connection:
            connection.autocommit = True
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
            if found is None:
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

    def drop_database(self, name: str) -> None:
        """Remove a database and all that is in it, whoever is connected."""
        with self._connect("postgres") as connection:
            connection.autocommit = True
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def url(self, database: str, driver: str = "psycopg") -> str:
        """SQLAlchemy URL of a database."""
        return f"postgresql+{driver}://{USER}:{self.password}@{HOST}:{self.port}/{database}"

    @property
    def password(self) -> str:
        path = self.data / "password"
        if not path.exists():
            write_durably(self.folder() / path.name, secrets.token_hex(24).encode(), mode=0o600)
        return path.read_text()

    def user(self) -> str | None:
        """PostgreSQL refuses root; root starts it as the package's own user."""
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            try:
                return pwd.getpwnam(name).pw_name
            except KeyError:
                continue
        raise ConfigError("PostgreSQL does not run as root, and there is no user postgres or nobody", "make one")

    def _unlock(self) -> None:
        """Remove the lock of a killed postmaster that nobody has reaped: it still has a number, and PostgreSQL takes it
        for alive. One that lives keeps its lock."""
        lock = self._cluster / "postmaster.pid"
        try:
            if psutil.Process(int(lock.read_text().split()[0])).status() == psutil.STATUS_ZOMBIE:
                lock.unlink()
        except (OSError, ValueError, IndexError, psutil.Error):
            return

    @property
    def _cluster(self) -> Path:
        return self.data / "cluster"

    def _connect(self, database: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(
            host=HOST, port=self.port, user=USER, password=self.password, dbname=database, connect_timeout=3
        )

    def _installed(self) -> Path | None:
        """Folder of the server programs: of the release that made the cluster, else of the newest."""
        made_by = self._made_by()
        for folder in installations():
            if made_by in (None, release(folder).split(".")[0]):
                return folder
        return None

    def _made_by(self) -> str | None:
        mark = self._cluster / "PG_VERSION"
        return mark.read_text().strip() if mark.exists() else None

    def _program(self, name: str) -> str:
        folder = self._installed()
        if folder is not None:
            return str(folder / name)
        if installations():
            raise ConfigError(
                f"the cluster in {self._cluster} was made by PostgreSQL {self._made_by()}, which is not installed",
                "install that release again, or move the data with pg_upgrade or pg_dump",
            )
        raise ConfigError(
            f"PostgreSQL {self.wanted} is neither on the PATH nor below /usr/lib/postgresql",
            "install the package postgresql, or set LWD_CATALOG to a server that you have",
        )


def installations() -> list[Path]:
    """Folders with the server programs of a release that is new enough; the one on the PATH, then the newest first."""
    named = [found for name in ("postgres", "initdb") if (found := shutil.which(name))]
    folders = [Path(os.path.realpath(path)).parent for path in named]
    whole = [folder for folder in (*folders, *_packaged()) if all((folder / name).exists() for name in _PROGRAMS)]
    return [folder for folder in dict.fromkeys(whole) if int(release(folder).split(".")[0]) >= _OLDEST]


def _packaged() -> list[Path]:
    """The folders of Debian's and of the RPM packages, the newest release first."""
    found = [folder for pattern in _PACKAGED for folder in Path("/usr").glob(pattern)]
    return sorted(found, key=lambda folder: float(re.sub(r"[^\d.]", "", str(folder.parent)) or 0), reverse=True)


@functools.cache
def release(folder: Path) -> str:
    """What the programs in this folder say they are: `15.18`, for example."""
    said = run([str(folder / "postgres"), "--version"], "asking PostgreSQL for its version", fix="install it again")
    found = re.search(r"\d+(\.\d+)?", said)
    return found[0] if found else "0"
