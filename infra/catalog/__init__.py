"""The catalog: what exists, in which snapshot, for whom. SQLite here, PostgreSQL for a fleet, both by SQLAlchemy Core.

`schema` holds the tables, `migrations` (Alembic, packaged) makes them, `store` opens the database and hands out
transactions, `dialect` is the one place that knows which database it is.
"""

from infra.catalog.store import Catalog

__all__ = ["Catalog"]
