"""``rich`` for text that may be untrusted: control characters in lines, tables and progress are shown as escapes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from .sanitise import SanitisedStream, visible


class Console(RichConsole):
    """A ``rich`` console on stdout or stderr. The only control characters it sends are those of ``rich`` itself."""

    def __init__(self, stderr: bool = False, **options: Any):
        stream = sys.stderr if stderr else sys.stdout
        super().__init__(file=stream.inner if isinstance(stream, SanitisedStream) else stream, stderr=stderr, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
