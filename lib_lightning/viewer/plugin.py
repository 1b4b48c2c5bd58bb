"""TensorBoard's tab "LIB". TensorBoard imports this at its start, so nothing here takes long or fails for others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tensorboard.backend.http_util import Respond
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from tensorboard.util import tb_logging
from werkzeug.wrappers import Request, Response

from lib_lightning.viewer.bundle import static_files
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.json_text import dump
from lib_lightning.viewer.run_discovery import find_runs
from lib_lightning.viewer.run_view import NotThereError, RunView

log = tb_logging.get_logger()
# Bytes that what was read of all runs may take up.
_ROOM = 512 << 20
# Seconds before runs are looked for again; and of all time, the share that looking takes at most.
_PAUSE, _SHARE = 3.0, 0.05
_TYPES = {".js": "text/javascript", ".css": "text/css"}


class LIBPlugin(TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """Shows interaction graphs over time, of all runs below the log directory.

    What a request names is looked up among the runs that were found there. No path is ever made of it, and links are
    not followed.

    Args:
        context: TensorBoard's, of which flags and log directory are looked at.
    """

    plugin_name = "lib"

    def __init__(self, context: TBContext) -> None:
        self._roots = _roots(context)
        self._cache = Cache(_ROOM)
        self._films: dict[str, RunView] = {}
        self._lock = threading.Lock()
        self._look_again = 0.0

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """The answer to each address, below ``/data/plugin/lib``."""
        static = {
            f"/{name}": _app(partial(_of, content), _TYPES[Path(name).suffix])
            for name, content in static_files().items()
        }
        data = {"/runs": self._runs, "/run": self._run, "/snapshot": self._snapshot}
        return {**static, **{route: _app(answer, "application/json") for route, answer in data.items()}}

    def is_active(self) -> bool:
        """Whether there is a run to show."""
        try:
            return bool(self._found())
        except Exception:
            log.exception("Interaction graphs could not be looked for.")
            return False

    def frontend_metadata(self) -> FrontendMetadata:
        """The tab, and the module that draws it."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="LIB")

    def _found(self) -> dict[str, RunView]:
        """The runs there are, by name. TensorBoard asks all the time, and folders may be many: not each time anew."""
        with self._lock:
            started = time.monotonic()
            if started >= self._look_again:
                folders = {
                    f"{prefix}/{name}" if prefix else name: (folder, Path(os.path.realpath(root)))
                    for prefix, root in self._roots
                    for name, folder in find_runs(root).items()
                }
                self._films = {
                    name: self._films.get(name) or RunView(folder, name, self._cache, below)
                    for name, (folder, below) in folders.items()
                }
                took = time.monotonic() - started
                self._look_again = started + max(_PAUSE, took / _SHARE)
            return self._films

    def _film(self, request: Request) -> RunView:
        name = request.args.get("run", "")
        if name not in (found := self._found()):
            raise NotThereError(f"There is no run '{name}' below the log directory.")
        return found[name]

    def _runs(self, request: Request) -> str:
        return dump([film.entry() for film in self._found().values()])

    def _run(self, request: Request) -> str:
        return self._film(request).run()

    def _snapshot(self, request: Request) -> str:
        film, step = self._film(request), request.args.get("step", "")
        if not (step.isascii() and step.isdigit() and len(step) < 20):
            raise NotThereError(f"There is no snapshot at step '{step}': steps are whole numbers.")
        return film.snapshot(int(step))


def _of(content: str, request: Request) -> str:
    return content


def _app(answer: Callable[[Request], str], kind: str) -> Callable[..., Any]:
    """An answer as TensorBoard takes it: what goes wrong is a sentence, and never TensorBoard's trouble."""

    def respond(request: Request) -> Response:
        content, content_type, code = "", "application/json", 200
        if request.method not in ("GET", "HEAD"):
            content, code = _error("This address is only read."), 405
        else:
            try:
                content, content_type = answer(request), kind
            except NotThereError as error:
                content, code = _error(str(error)), 404
            except Exception as error:
                log.exception("Interaction graphs: %s failed.", request.path)
                content, code = _error(f"This failed: {type(error).__name__}: {error}"), 500
        response: Response = Respond(request, content, content_type, code=code)
        response.headers["Cache-Control"] = "no-store"
        return response

    return Request.application(respond)


def _error(sentence: str) -> str:
    return dump({"error": sentence})


def _roots(context: TBContext) -> list[tuple[str, Path]]:
    """Log directories, each with a name to put before those of its runs: "" for the only one there is."""
    if context.logdir:
        specs = [("", str(context.logdir))]
    else:
        parts = str(getattr(context.flags, "logdir_spec", None) or "").split(",")
        specs = [_named(part) for part in parts if part]
    # What is on another machine ("gs://...") is no folder, and has no runs.
    return [(name, Path(path).expanduser()) for name, path in specs if "://" not in path]


def _named(spec: str) -> tuple[str, str]:
    """Name and path of a part of --logdir_spec, "name:path" or "path"."""
    name, colon, path = spec.partition(":")
    if colon and not Path(spec).is_absolute() and not path.startswith("//"):
        return name, path
    return Path(spec).name, spec
