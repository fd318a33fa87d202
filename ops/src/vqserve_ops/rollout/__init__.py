"""`vqserve-ops rollout`: waits for a release, and says in words what keeps a pod from serving.

`pending` and `failing` are pure functions from the API's objects to sentences; `command` watches and prints.
"""

from __future__ import annotations
