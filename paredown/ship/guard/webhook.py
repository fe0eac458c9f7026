"""Alerts by webhook: sent from a thread of their own, and dropped rather than waited for."""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from paredown.core.settings import require

WAITING = 100  # alerts that wait at the most; later ones are dropped, and counted
TRIES = 3


def is_address(url: object) -> bool:
    """Whether it is a URL of http or https with a host, and a port that there is.

    Example:
        >>> is_address("http://127.0.0.1:8080"), is_address("http://[::1"), is_address("http://x:0x")
        (True, False, False)
    """
    if not isinstance(url, str) or " " in url or not url.isprintable():
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of an address in brackets, or of a port
        return False


class Webhook:
    """Posts each alert as JSON to a URL.

    Args:
        url: of http or https.
        timeout_s: of one try; there are three.
        pause_s: between two tries.

    Raises:
        UserError: the URL is none of these.

    Example:
        >>> Webhook("file:///etc/passwd")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: webhook: expected a URL of http or https, got \
'file:///etc/passwd'.
    """

    def __init__(self, url: str, timeout_s: float = 5.0, pause_s: float = 1.0):
        require("webhook", url, is_address(url), "a URL of http or https")
        self.sent = self.dropped = 0
        self._taken = self._failed = 0
        self._closed = False
        self._url, self._timeout_s, self._pause_s = url, timeout_s, pause_s
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._started = False

    @property
    def failed(self) -> int:
        """Alerts that were not delivered; once closed, those that still wait or are on their way
        count as well."""
        return self._taken - self.sent if self._closed else self._failed

    def send(self, alert: dict[str, Any]) -> None:
        """Hand an alert over; never waits, and never fails."""
        if not self._started:
            self._started = True
            self._thread.start()
        try:
            self._waiting.put_nowait(json.dumps(alert, default=str).encode())
            self._taken += 1
        except queue.Full:
            self.dropped += 1

    def close(self, wait_s: float = 10.0) -> None:
        """Send what waits, for at most so long, and end."""
        if self._started:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                self._ends.set()
            self._thread.join(wait_s)
            self._ends.set()
        self._closed = True

    def _work(self) -> None:
        while not self._ends.is_set():
            body = self._waiting.get()
            if body is None:
                return
            if any(self._posted(body, number) for number in range(TRIES)):
                self.sent += 1
            else:
                self._failed += 1

    def _posted(self, body: bytes, number: int) -> bool:
        if number and self._ends.wait(self._pause_s):
            return False
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return bool(200 <= answer.status < 300)
        except (OSError, ValueError, urllib.error.URLError):
            return False
        except Exception:  # a broken answer, such as http.client's own: an alert is not worth more
            return False
