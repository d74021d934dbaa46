"""Makes `invariants` importable in this folder and below (pytest puts a conftest's folder on the path)."""
