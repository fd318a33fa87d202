"""`vqserve-ops support-bundle`: what explains a release, in one archive that may be shown to others."""

from __future__ import annotations
