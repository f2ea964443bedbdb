"""For the pages of the API: docstrings as the reader of Google's style expects them.

The library's docstrings say `Example:`, and give references in a section of their own. The reader takes
the first for plain text, in which `>>>` would be a quotation of a quotation.
"""

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    """Renames the sections."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Changes an object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", obj.docstring.value)
