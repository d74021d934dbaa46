"""Every Prefect flow by name: what `lwd` and `prefect.yaml` refer to."""

from flows.demo import demo
from flows.offline import collect, offline
from flows.online import online
from flows.promote import canary, evaluate, promote, rollback
from flows.reporting import report

__all__ = ["canary", "collect", "demo", "evaluate", "offline", "online", "promote", "report", "rollback"]
