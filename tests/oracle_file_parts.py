"""Files of rows, as oracles and their command read them."""

from __future__ import annotations

import json


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
