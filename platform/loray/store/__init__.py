"""Adapters by digest: an object store, adapters in it, and each node's cache of them."""

from loray.store.adapters import AdapterStore
from loray.store.cache import NODE_CACHE_BYTES, AdapterCache, write_entry
from loray.store.objects import LocalStore, ObjectStore
from loray.store.open import open_filesystem, open_store

__all__ = [
    "NODE_CACHE_BYTES",
    "AdapterCache",
    "AdapterStore",
    "LocalStore",
    "ObjectStore",
    "open_filesystem",
    "open_store",
    "write_entry",
]
