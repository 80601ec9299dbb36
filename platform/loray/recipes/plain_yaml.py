"""YAML without aliases, of fields that may come from anybody."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import ComposerError

from loray.errors import SpecError


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, f"write out what the alias *{event.anchor} stands for", event.start_mark)
        return super().compose_node(parent, index)


def parse_plain(text: str | bytes, *, source: str) -> Any:
    """What `text` says. Raises SpecError, which begins with `source`, for what is no YAML and for aliases: a few lines
    of them may stand for more than fits in memory.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as e:
        raise SpecError(f"{source} is not valid YAML: {e}") from e
