"""The type of options that are parsed later.

With type arguments the command line's parser would look into them, take texts such as ``torch.optim.AdamW`` for
classes, and fill in all of their defaults, also those that they do not accept. It reads ``if TYPE_CHECKING`` in the
module of a function whose types it looks up, hence a module of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Unparsed = dict[str, Any]
else:
    Unparsed = dict
