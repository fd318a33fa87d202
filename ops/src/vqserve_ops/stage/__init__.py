"""`vqserve-ops stage`: brings a checkpoint into a folder, and says last that it is all there.

What is not the checkpoint's own - parts, lock, marker - is kept in `DEST/.cache/vqserve-stage`: on the same file
system, so that a finished part is renamed into place, and in a folder that the format's checks pass over as they do for
hubs, so that `vqserve verify` and `vqserve serve` take DEST as it is.
"""

from __future__ import annotations
