"""Apache Kafka: one KRaft node, from the jars that `pom.xml` names."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.errors import ConfigError
from infra.events.broker import create_topic
from infra.servers.server import Server
from infra.servers.toolchain import HOST, program, run

TOPIC, PARTITIONS = "lwd.episodes", 4
_JAVA = 17
_FIX = "install it (Debian: default-jre-headless and maven), or set LWD_KAFKA_BOOTSTRAP to a broker that you have"
_POM = Path(__file__).with_name("pom.xml")
_LOGGING = """<Configuration status="WARN"><Appenders><Console name="out"><PatternLayout pattern="%d %p %c{1}: %m%n"/>
</Console></Appenders><Loggers><Root level="WARN"><AppenderRef ref="out"/></Root></Loggers></Configuration>
"""


class Kafka(Server):
    """A broker that is its own controller."""

    name, wanted = "kafka", "4.3.1"
    further_ports = ("controller_port",)

    @property
    def prepared(self) -> bool:
        _java()
        return self._jars.is_dir()

    def obtain(self) -> None:
        """Half a minute: Maven copies the jars that the POM names."""
        maven = program("mvn", "Kafka needs Maven, once", _FIX)
        partial = self._jars.with_name(f"{self._jars.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        run(
            [maven, "-q", "-B", "-f", str(_POM), "dependency:copy-dependencies", f"-DoutputDirectory={partial}"],
            "getting Kafka's jars",
            fix="see that Maven reaches its repository, then run `lwd servers prepare` again",
        )
        partial.rename(self._jars)

    def initialise(self) -> None:
        if (self.data / "log" / "meta.properties").exists():
            return
        identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        argv = [_java(), "-cp", f"{self._jars}/*", "kafka.tools.StorageTool", "format", "--standalone"]
        self._configure()
        run(
            [*argv, f"--cluster-id={identity}", "-c", str(self._properties)],
            "formatting Kafka's log",
            fix="free disk space",
        )

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self._configure()
        logging = self.data / "log4j2.xml"
        logging.write_text(_LOGGING)
        java = [_java(), "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]  # the last halves the start
        return [
            *java,
            f"-Dlog4j2.configurationFile={logging}",
            "-cp",
            f"{self._jars}/*",
            "kafka.Kafka",
            str(self._properties),
        ], {}

    def settle(self) -> None:
        create_topic(self.bootstrap, TOPIC, PARTITIONS)

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self.port}"

    def wipe(self) -> None:
        """Lose the log, as a broker without replicas does with its disk; the next start begins an empty one.

        Raises:
            ConfigError: it runs.
        """
        if self.pid is not None:
            raise ConfigError("Kafka runs on the log that is to be removed", "stop or kill it first")
        shutil.rmtree(self.data / "log", ignore_errors=True)

    @property
    def _jars(self) -> Path:
        """A folder of its own for each state of the POM: a running broker still loads classes from the one it has."""
        return self.programs / f"kafka-{self.wanted}-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:8]}"

    @property
    def _properties(self) -> Path:
        return self.data / "server.properties"

    def _configure(self) -> None:
        controller = self.named_port("controller_port")
        one = "offsets.topic.replication.factor transaction.state.log.replication.factor transaction.state.log.min.isr"
        lines = [
            "process.roles=broker,controller",
            "node.id=1",
            f"listeners=PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{controller}",
            f"advertised.listeners=PLAINTEXT://{HOST}:{self.port},CONTROLLER://{HOST}:{controller}",
            f"controller.quorum.bootstrap.servers={HOST}:{controller}",
            "controller.listener.names=CONTROLLER",
            "listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            f"log.dirs={self.data / 'log'}",
            "auto.create.topics.enable=false",
            "broker.session.timeout.ms=4000",  # how long a killed one is still believed to live, and may not come back
            "broker.heartbeat.interval.ms=500",
            "group.initial.rebalance.delay.ms=0",
            "offsets.topic.num.partitions=4",
            "share.coordinator.state.topic.replication.factor=1",
            "share.coordinator.state.topic.min.isr=1",
            *(f"{name}=1" for name in one.split()),
        ]
        self._properties.write_text("\n".join(lines) + "\n")


def _java() -> str:
    """Path of a Java that can run this broker."""
    java = program("java", f"Kafka needs Java {_JAVA} or newer", _FIX)
    first = run([java, "--version"], f"finding a Java {_JAVA} or newer", fix=_FIX).partition("\n")[0]
    found = re.search(r"\d+", first)
    if found is None or int(found[0]) < _JAVA:
        raise ConfigError(f"Kafka needs Java {_JAVA} or newer; {java} is {first!r}", _FIX)
    return java
