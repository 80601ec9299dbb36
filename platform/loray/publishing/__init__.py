"""Publishing: from an adapter's folder to a version in the catalog; conversion and merging of published adapters."""

from loray.publishing.ephemeral import ephemeral
from loray.publishing.publish import Destination, base_of, import_folder, publish, register_stored, restore, store

__all__ = ["Destination", "base_of", "ephemeral", "import_folder", "publish", "register_stored", "restore", "store"]
