"""Typed clients of a running loray: the OpenAI-compatible endpoint, and the catalog's REST API."""

from loray.client.catalog import CatalogClient
from loray.client.openai import LorayClient

__all__ = ["CatalogClient", "LorayClient"]
