"""The TensorBoard plugin with the tab "LIB".

TensorBoard imports this module at startup, so importing it must be fast, and its errors must not affect other plugins.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard.backend.http_util import Respond
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug.wrappers import Request, Response

from lib_lightning.errors import LIBError
from lib_lightning.viewer.bundle import comparison_script, script_hash, static_files
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.json_text import dump
from lib_lightning.viewer.many_runs import METRIC, SCALAR, curve_names, curves, shared_features, stamp, universal_files
from lib_lightning.viewer.note_request import RefusedError, is_local, read_note_request
from lib_lightning.viewer.notes import annotate
from lib_lightning.viewer.run_discovery import FileStamp, find_runs
from lib_lightning.viewer.run_view import NotFoundError, RunView

log = logging.getLogger("tensorboard")
# Maximum size of cached data of all runs, in bytes.
_CACHE_BYTES = 512 << 20
# Runs are searched for at intervals of at least this many seconds, using at most this fraction of the time.
_MIN_INTERVAL, _MAX_TIME_SHARE = 3.0, 0.05
_CONTENT_TYPES = {".js": "text/javascript", ".css": "text/css"}


class LIBPlugin(TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Serves the interaction graphs over training of all runs below the log directory.

    The run in a request is looked up among the runs found there. Requests are never used to construct paths, and
    symbolic links are not followed. Nothing is written but the user's notes on features, for requests of a page that
    this server has sent to a browser on the same machine; see `lib_lightning.viewer.note_request`.

    Args:
        context: TensorBoard's context, with its flags and log directory.
    """

    plugin_name = "lib"

    def __init__(self, context: TBContext) -> None:
        self._roots = _roots(context)
        self._cache = Cache(_CACHE_BYTES)
        self._found: dict[str, RunView] = {}
        self._lock = threading.Lock()
        self._next_search = 0.0

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """WSGI application for each route below ``/data/plugin/lib``."""
        static = {
            f"/{name}": _app(partial(_static, content), _CONTENT_TYPES[Path(name).suffix])
            for name, content in static_files().items()
        }
        data = {
            "/runs": self._list_runs,
            "/run": self._describe_run,
            "/snapshot": self._describe_snapshot,
            "/feature": self._describe_feature,
            "/curve_names": self._list_curves,
            "/curves": self._describe_curves,
            "/shared_features": self._describe_shared_features,
        }
        return {
            **static,
            **{route: _app(handler, "application/json") for route, handler in data.items()},
            "/comparison": _app(self._show_comparison, "text/html"),
            "/note": _app(self._write_note, "application/json", methods=("POST",)),
        }

    def is_active(self) -> bool:
        """Whether there are any runs."""
        try:
            return bool(self._runs())
        except Exception:
            log.exception("LIB plugin: cannot search the log directory for runs.")
            return False

    def frontend_metadata(self) -> FrontendMetadata:
        """Name of the tab and its JavaScript module."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="LIB")

    def _runs(self) -> dict[str, RunView]:
        """All runs by name. Cached for a while: TensorBoard asks frequently, and there may be many folders."""
        with self._lock:
            started = time.monotonic()
            if started >= self._next_search:
                folders = {
                    f"{prefix}/{name}" if prefix else name: (folder, Path(os.path.realpath(root)))
                    for prefix, root in self._roots
                    for name, folder in find_runs(root).items()
                }
                self._found = {
                    name: self._found.get(name) or RunView(folder, name, self._cache, root)
                    for name, (folder, root) in folders.items()
                }
                duration = time.monotonic() - started
                self._next_search = started + max(_MIN_INTERVAL, duration / _MAX_TIME_SHARE)
            return self._found

    def _requested_run(self, request: Request) -> RunView:
        name = request.args.get("run", "")
        if name not in (runs := self._runs()):
            raise NotFoundError(f"There is no run '{name}' below the log directory.")
        return runs[name]

    def _list_runs(self, request: Request) -> str:
        universal = stamp(self._universal_files())
        return dump([{**run.entry(), "universal": universal} for run in self._runs().values()])

    def _describe_run(self, request: Request) -> str:
        return self._requested_run(request).run()

    def _describe_snapshot(self, request: Request) -> str:
        return self._requested_run(request).snapshot(_whole_number(request.args.get("step", ""), "step", "steps"))

    def _describe_feature(self, request: Request) -> str:
        step, layer, which = (
            _whole_number(request.args.get(key, ""), key, f"{key}s") for key in ("step", "layer", "feature")
        )
        described = self._requested_run(request).feature(step, layer, which)
        # Where notes can be written, the page lets them be edited.
        return f'{{"editable":{dump(is_local(request))},{described[1:]}'

    def _list_curves(self, request: Request) -> str:
        return curve_names(self._runs().values())

    def _describe_curves(self, request: Request) -> str:
        kind = request.args.get("kind", METRIC)
        if kind not in (METRIC, SCALAR):
            raise NotFoundError(f"There are curves of kind '{METRIC}' and '{SCALAR}', none of kind '{kind}'.")
        return curves(self._runs().values(), kind, request.args.get("name", ""))

    def _universal_files(self) -> list[FileStamp]:
        roots = [Path(os.path.realpath(root)) for _, root in self._roots]
        return universal_files([run.folder for run in self._runs().values()], roots)

    def _describe_shared_features(self, request: Request) -> str:
        return shared_features(list(self._runs().values()), self._universal_files())

    def _show_comparison(self, request: Request) -> str:
        return self._requested_run(request).comparison()

    def _write_note(self, request: Request) -> str:
        note = read_note_request(request)
        runs = self._runs()
        if note.run not in runs:
            raise NotFoundError(f"There is no run '{note.run}' below the log directory.")
        try:
            annotate(runs[note.run].folder, note.feature, note.text)
        except LIBError as error:
            raise RefusedError(str(error), 409) from error
        return dump({"note": runs[note.run].notes().get(note.feature, "")})


def _whole_number(text: str, name: str, names: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        what = "snapshot at step" if name == "step" else name
        raise NotFoundError(f"There is no {what} '{text}': {names} are whole numbers.")
    return int(text)


def _static(content: str, request: Request) -> str:
    return content


def _app(
    handler: Callable[[Request], str], success_type: str, methods: Sequence[str] = ("GET", "HEAD")
) -> Callable[..., Any]:
    """WSGI application of a request handler, which reports errors as JSON instead of raising them."""

    def respond(request: Request) -> Response:
        content, content_type, code = "", "application/json", 200
        if request.method not in methods:
            content, code = _error(f"Only {methods[0]} requests are allowed."), 405
        else:
            try:
                content, content_type = handler(request), success_type
            except NotFoundError as error:
                content, code = _error(str(error)), 404
            except RefusedError as error:
                content, code = _error(str(error)), error.code
            except Exception as error:
                log.exception("LIB plugin: request %s failed.", request.path)
                content, code = _error(f"The request failed: {type(error).__name__}: {error}"), 500
        # Of a page, this very script may run and no other, whatever the file contains.
        scripts = [script_hash(comparison_script())] if content_type == "text/html" else None
        response: Response = Respond(request, content, content_type, code=code, csp_scripts_sha256s=scripts)
        response.headers["Cache-Control"] = "no-store"
        return response

    return Request.application(respond)


def _error(message: str) -> str:
    return dump({"error": message})


def _roots(context: TBContext) -> list[tuple[str, Path]]:
    """Log directories, each with a prefix for the names of its runs, "" if there is only one."""
    if context.logdir:
        specs = [("", str(context.logdir))]
    else:
        parts = str(getattr(context.flags, "logdir_spec", None) or "").split(",")
        specs = [_named(part) for part in parts if part]
    # Remote directories ("gs://...") are not supported.
    return [(name, Path(path).expanduser()) for name, path in specs if "://" not in path]


def _named(spec: str) -> tuple[str, str]:
    """Name and path in an entry of --logdir_spec: "name:path" or "path"."""
    name, colon, path = spec.partition(":")
    if colon and not Path(spec).is_absolute() and not path.startswith("//"):
        return name, path
    return Path(spec).name, spec
