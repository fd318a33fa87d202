"""Asks the served model a sum, as `helm test` does: through the Service, with the key, by its name."""

from __future__ import annotations

import json
import os
import sys
import urllib.request


def main() -> None:
    """Ends with what is wrong, if anything is."""
    body = {
        "model": os.environ["MODEL"],
        "messages": [{"role": "user", "content": "12 + 34 = ?"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "max_tokens": 200,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(os.environ["URL"], json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer = json.load(reply)["choices"][0]["message"]["content"]
    print(f"12 + 34 = ? {answer}")
    if "46" not in (answer or ""):
        sys.exit("expected 46")


if __name__ == "__main__":
    main()
