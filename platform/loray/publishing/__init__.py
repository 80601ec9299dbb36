"""From a folder to a name in the catalog; and published adapters in another form."""

from loray.publishing.publish import Destination, base_of, import_folder, publish, register_stored

__all__ = ["Destination", "base_of", "import_folder", "publish", "register_stored"]
