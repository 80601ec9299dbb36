"""Tool calls in generated text: how they are written, read and enforced."""

from loray.text.tools.constraint import calls_constraint, with_tools
from loray.text.tools.parsers import MARKERS, Piece, ToolParser, detect, overlap, parser_for

__all__ = ["MARKERS", "Piece", "ToolParser", "calls_constraint", "detect", "overlap", "parser_for", "with_tools"]
