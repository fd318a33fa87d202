"""`python -m loadtest OPTIONS`: Locust with this package's locustfile, and its options in `--help`."""

from __future__ import annotations

import os
from pathlib import Path

from locust.main import main

import loadtest.options  # noqa: F401 # declares them

os.environ.setdefault("LOCUST_LOCUSTFILE", str(Path(__file__).with_name("locustfile.py")))
main()
