"""Alembic's environment, packaged: the catalog applies it when it is opened."""
