"""Triton's cache, with files of the image before it: `TRITON_CACHE_MANAGER=vqserve_image.image_cache:ImageCache`."""

from __future__ import annotations

from pathlib import Path

from triton.runtime.cache import FileCacheManager

BUILT = Path(__file__).with_name("triton")


class ImageCache(FileCacheManager):  # type: ignore[misc] # triton is not in .venv
    """Reads from the image what `ahead.py` compiled, all else as ever."""

    def get_file(self, filename: str) -> str | None:
        """Path of a file of this key, or None."""
        built = BUILT / self.key / filename
        found: str | None = str(built) if built.is_file() else super().get_file(filename)
        return found
