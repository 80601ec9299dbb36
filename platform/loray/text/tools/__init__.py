"""Tool calls in generated text: how they are written, read and enforced."""

from loray.text.tools.choose import MARKERS, detect, parser_for
from loray.text.tools.constraint import calls_constraint
from loray.text.tools.parser import Piece, ToolParser
from loray.text.tools.prompt import with_tools

__all__ = ["MARKERS", "Piece", "ToolParser", "calls_constraint", "detect", "parser_for", "with_tools"]
