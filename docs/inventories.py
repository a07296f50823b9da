"""Links to the pages of other projects, without the network.

Sphinx finds the address of a name such as `torch.Tensor` in the other project's inventory, which it would download.
`docs/inventories/NAME.txt` lists the names that our pages use, and their addresses. This module makes inventories of
these lists.
"""

import zlib
from pathlib import Path

_LISTS = Path(__file__).parent / "inventories"
_HEADER = """# Sphinx inventory version 2
# Project: {}
# Version:
# The remainder of this file is compressed using zlib.
"""


def mapping(folder: Path) -> dict[str, tuple[str, str]]:
    """Write the inventories into a folder.

    Returns:
        What `intersphinx_mapping` takes: by project, the address of its pages and the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in sorted(_LISTS.glob("*.txt")):
        address, entries = read(path)
        lines = "".join(f"{name} {role} 1 {page} -\n" for name, role, page in entries)
        inventory = folder / f"{path.stem}.inv"
        inventory.write_bytes(_HEADER.format(path.stem).encode() + zlib.compress(lines.encode()))
        found[path.stem] = (address, str(inventory))
    return found


def read(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """Read a list: the address of the pages in the first line, then a name, its role and its page in each.

    Returns:
        The address, and the entries. A `$` in a page stands for the name.
    """
    address, *lines = path.read_text(encoding="utf-8").split("\n")
    entries = [tuple(line.split()) for line in lines if line and not line.startswith("#")]
    return address, [(name, role, page.replace("$", name)) for name, role, page in entries]
