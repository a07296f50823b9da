"""Names that people type, and what they may have meant."""

from collections.abc import Collection
from difflib import get_close_matches

from implicit_attention.errors import bad_value


def known(what: str, name: str, names: Collection[str]) -> str:
    """Return a name if it is one of those there are.

    Args:
        what: What it names, such as "arm".
        name: What was typed.
        names: What there is.

    Raises:
        ValueError: If it is none of them; the message names the nearest.
    """
    if name in names:
        return name
    near = get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    raise bad_value(what, f"one of {', '.join(names)}", name, hint)
