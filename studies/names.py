"""Names that users type, with a suggestion for a misspelt one."""

from collections.abc import Collection
from difflib import get_close_matches

from implicit_attention.errors import bad_value


def known(what: str, name: str, names: Collection[str]) -> str:
    """Return a name if it is known.

    Args:
        what: The kind of name, such as "arm".
        name: The name that was typed.
        names: The known names.

    Raises:
        ValueError: If it is unknown. The message has the nearest name.
    """
    if name in names:
        return name
    near = get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    raise bad_value(what, f"one of {', '.join(names)}", name, hint)
