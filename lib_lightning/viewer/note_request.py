"""Requests to write a note: which ones are accepted.

A note changes a file, so a request must come from a page that this server has sent to a browser on the same machine:

1. The client's address is this machine's own (127.0.0.0/8, ::1), and so is the host that it asked for, so that no other
   name can stand for this machine (DNS rebinding). No proxy has passed the request on, because its client could be
   anywhere.
2. The page is of the same origin (header ``Origin``). Browsers let no page choose that header.
3. The request has a header of its own and its content is JSON, which browsers let pages of other origins send only
   after asking this server for permission, and it gives none.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from werkzeug.wrappers import Request

from lib_lightning.errors import LIBError

# A header that only the viewer's own page sends.
HEADER = "X-LIB-Note"
# Maximum size of a request, in bytes: enough for a note of 10,000 characters.
MAX_BYTES = 64 << 10
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via")


class RefusedError(LIBError):
    """A request that is not carried out.

    Args:
        message: The reason.
        code: Status code of HTTP.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class NoteRequest:
    """A note to be written.

    Attributes:
        run: Name of the run.
        feature: The feature's id, such as ``"resid_post/17"``.
        text: The note; "" to remove it.
    """

    run: str
    feature: str
    text: str


def is_local(request: Request) -> bool:
    """Whether the client of a request is on this machine, and asked for this machine.

    Args:
        request: Any request.

    Returns:
        False as well if a proxy has passed it on.
    """
    if any(header in request.headers for header in _FORWARDED):
        return False
    return _is_loopback(request.remote_addr or "") and _is_loopback(urlsplit(f"//{request.host}").hostname or "")


def read_note_request(request: Request) -> NoteRequest:
    """Check a request, and read the note in it.

    Args:
        request: The request.

    Returns:
        The note.

    Raises:
        RefusedError: If the request is not one of the viewer's own page on this machine, is too large, or is no note.
    """
    if not is_local(request):
        raise RefusedError(
            "Notes are written only from a browser on the machine on which TensorBoard runs. From elsewhere, use "
            'Run(folder).annotate("layer/number", "text").',
            403,
        )
    if request.headers.get("Origin") != f"{request.scheme}://{request.host}" or request.headers.get(HEADER) != "1":
        raise RefusedError("Notes are written only from the tab LIB of this TensorBoard.", 403)
    if request.mimetype != "application/json":
        raise RefusedError("A note is sent as JSON.", 415)
    if request.content_length is None or request.content_length > MAX_BYTES:
        raise RefusedError(f"A request to write a note has {MAX_BYTES:,} bytes at most.", 413)
    return _note(request.get_data(cache=False))


def _note(content: bytes) -> NoteRequest:
    try:
        sent: Any = json.loads(content)
    except (ValueError, RecursionError):
        sent = None
    names = ("run", "feature", "text")
    if not isinstance(sent, dict) or set(sent) != set(names) or not all(isinstance(sent[n], str) for n in names):
        raise RefusedError('A note is a JSON object {"run": ..., "feature": "layer/number", "text": ...}.', 400)
    return NoteRequest(**sent)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # An IPv4 client of a server that listens on IPv6.
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
