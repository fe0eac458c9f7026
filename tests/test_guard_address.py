"""`paredown rollout`: an address that is none, and a server that is another, end in a sentence."""

import http.server
import threading

import pytest

from paredown.cli.serving import _asked
from paredown.core.errors import UserError
from paredown.ship.guard.webhook import is_address


@pytest.mark.parametrize(
    "url", ["http://[::1", "ftp://x", "x:99999", "http://x:0", "http://", "", "http://a b", "x\n"]
)
def test_what_is_no_address_is_told_with_one_that_is(url):
    with pytest.raises(UserError) as told:
        _asked(url)
    assert str(told.value).startswith("url: expected a server's address, such as http://127.0.0.1")


def test_addresses_are_known():
    for url in ("http://127.0.0.1:8080", "https://[::1]:80/x", "http://a.example/b?c=d"):
        assert is_address(url)


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", b"HTTP/1.0 200 OK\r\n\r\n[]", b""])
def test_another_server_is_told(answer):
    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(answer)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match="no answer of a paredown server"):
            _asked(f"127.0.0.1:{server.server_port}")
