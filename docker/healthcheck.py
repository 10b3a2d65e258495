"""Health check of a container: exit code 0 when every URL given answers 200 within three seconds.

python healthcheck.py http://127.0.0.1:8001/readyz
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request


def fault(url: str) -> str | None:
    """None when ``url`` answers 200, else the reason why not."""
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return None if answer.status == 200 else f"{url}: {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{url}: {error}"


if __name__ == "__main__":
    faults = [reason for url in sys.argv[1:] if (reason := fault(url))]
    print("\n".join(faults) or "ok")
    sys.exit(1 if faults else 0)
