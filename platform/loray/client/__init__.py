"""Typed clients of a running loray: for the OpenAI-compatible endpoint, and for the catalog's REST API."""

from loray.client.catalog import CatalogClient
from loray.client.openai import LorayClient

__all__ = ["CatalogClient", "LorayClient"]
