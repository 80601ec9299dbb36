"""What is noted of adapters after they were published: evaluations and tags."""

from loray.catalog.notes.evaluations import Evaluations
from loray.catalog.notes.tags import Tags

__all__ = ["Evaluations", "Tags"]
