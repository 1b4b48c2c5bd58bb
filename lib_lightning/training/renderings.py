"""The samples that snapshots mention among their examples, rendered into the run folder; and names of outputs."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.progress import phase_done
from lib_lightning.distributed.process_group import ProcessGroup, first_number
from lib_lightning.errors import LIBError, brief, log_traceback
from lib_lightning.features.output_names import OutputNames, check_output_names, find_output_names
from lib_lightning.features.places import find_places
from lib_lightning.features.render import fitting_renderer, mentioned_samples, render_each
from lib_lightning.features.renderers import Renderer, check_renderer, render
from lib_lightning.features.sample import SampleReader
from lib_lightning.graph import InteractionGraph
from lib_lightning.io import basis_format as keys
from lib_lightning.io.rendering_file import Key, append_lines, key_of, read_lines, rendering_line
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.preserve import preserve_rng

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RenderingConfig:
    """How samples look, and what outputs are called.

    Args:
        renderer: The renderer; None for a fitting one.
        output_names: Names of the outputs; None for those of the model's configuration or the renderer's tokens.

    Raises:
        SettingTypeError: If they are anything else.
    """

    renderer: Renderer | None = None
    output_names: Any = None

    def __post_init__(self) -> None:
        check_renderer(self.renderer)
        check_output_names(self.output_names)


class RunRenderings:
    """Renders the samples of a run, each of them once, and names the outputs of its model.

    Args:
        config: How.
        name: Name of the callback, for messages.
        folders: The file of each prefix to write to; only the first process of a run uses it. None for a run that
            writes nothing.
        is_new: Whether the run has no snapshots yet: renderings of another run in its folder are then replaced.
    """

    def __init__(self, config: RenderingConfig, name: str, folders: Mapping[str, Path], is_new: bool) -> None:
        self._config, self._name, self._files = config, name, dict(folders)
        self._renderer: Renderer | None = config.renderer
        self._names: OutputNames | None = None
        self._places: dict[str, dict[str, Any]] | None = None
        self._knows_names = self._has_failed = self._is_checked = False
        # What has been rendered, or tried, by prefix; read from the files when it is needed first.
        self._done: dict[str, set[Key]] = {prefix: set() for prefix in folders} if is_new else {}
        self._starts_anew = dict.fromkeys(folders, is_new)

    def check(self, instrumented: InstrumentedModel, batch: Any) -> None:
        """Try what the user has given on a first batch, before training.

        Args:
            instrumented: The model.
            batch: The batch.

        Raises:
            LIBError: If the renderer does not fit the samples, or there are more or fewer names than outputs.
        """
        if self._is_checked or (self._config.renderer is None and self._config.output_names is None):
            return
        self._is_checked = True
        # A renderer of the user's may draw random numbers.
        with instrumented.session(), preserve_rng():
            if self._config.output_names is not None:
                find_output_names(self._config.output_names, self._renderer, instrumented, batch)
            if self._renderer is not None:
                reader = SampleReader.of_model(instrumented, batch)
                sample = next((sample for _, sample in reader.read([batch], [0])), None)
                try:
                    if sample is not None:
                        render(self._renderer, sample)
                except LIBError:
                    raise
                except Exception as error:  # of the user's, which may concern this sample alone
                    self._on_failure(0, error)

    def update(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        graphs: Mapping[str, InteractionGraph],
        process_group: ProcessGroup,
    ) -> None:
        """Render the samples that a snapshot mentions and no snapshot before it, and name the outputs in its graphs.

        All processes call this at the same time. Each renders its own samples, and the first one writes all of them.

        Args:
            instrumented: The model.
            batches: The batches of this process that the snapshot was computed on.
            graphs: Its graphs by prefix; modified in place.
            process_group: The processes.
        """
        try:
            with process_group.sync_errors(), preserve_rng():
                self._update(instrumented, batches, graphs, process_group)
        except Exception as error:  # the snapshot is there all the same
            if not self._has_failed:
                self._has_failed = True
                log.warning("%s: samples could not be rendered. This is not said again. %s", self._name, brief(error))
                log_traceback(error)
        phase_done("renderings")

    def _update(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        graphs: Mapping[str, InteractionGraph],
        process_group: ProcessGroup,
    ) -> None:
        batches = instrumented.parts(batch for batch in batches if instrumented.num_samples(batch))
        own = sum(map(instrumented.num_samples, batches))
        counts = [int(n) for n in process_group.gather(torch.tensor([own], device="cpu"))]
        first = first_number(counts, process_group)
        missing = {prefix: self._missing(prefix, graph) for prefix, graph in graphs.items()}
        wanted = sorted(set(itertools.chain.from_iterable(missing.values())))
        # What is in the files is known to the first process alone.
        (agreed,) = process_group.broadcast([torch.tensor(wanted, dtype=torch.int64, device="cpu")])
        with process_group.sync_errors():
            found = self._render(instrumented, batches, [int(i) for i in agreed], first, graphs)
            for graph in graphs.values():
                if graph.examples:
                    graph.info[keys.PLACES] = self._places or {}
                self.name_outputs(graph)
        renderings = _gather(found, process_group)
        if process_group.rank == 0:
            for prefix, graph in graphs.items():
                self._write(prefix, graph.info.get(keys.SAMPLES, ""), missing[prefix], renderings)

    def name_outputs(self, graph: InteractionGraph) -> None:
        """Name the outputs that a graph mentions, as far as names are known."""
        if self._names is not None and (names := self._names.plain(graph)):
            graph.info[keys.OUTPUT_NAMES] = names

    def _missing(self, prefix: str, graph: InteractionGraph) -> list[int]:
        """Samples of a graph that have not been rendered; none on processes that write nothing."""
        if prefix not in self._files:
            return []
        if prefix not in self._done:
            self._done[prefix] = {key for line in read_lines(self._files[prefix]) if (key := key_of(line)) is not None}
        of = graph.info.get(keys.SAMPLES, "")
        return [i for i in mentioned_samples(graph) if (i, of) not in self._done[prefix]]

    def _render(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        wanted: Sequence[int],
        first: int,
        graphs: Mapping[str, InteractionGraph],
    ) -> dict[int, dict[str, Any]]:
        """Renderings of those samples that are in the batches of this process."""
        call = instrumented.spec.call
        is_first = not self._knows_names or (self._places is None and any(graph.examples for graph in graphs.values()))
        if not batches or not (is_first or wanted):
            return {}
        # A step that computes what the model is called with is run.
        needs_model = is_first or (call is not None and call.step is not None)
        with instrumented.session() if needs_model else nullcontext():
            reader = self._reader(instrumented, batches[0])
            if is_first:
                self._find_places(instrumented, reader, batches[0], graphs)
            assert self._renderer is not None
            return render_each(reader, self._renderer, batches, wanted, first, self._on_failure)

    def _find_places(
        self, instrumented: InstrumentedModel, reader: SampleReader, batch: Any, graphs: Mapping[str, InteractionGraph]
    ) -> None:
        """Find where in the input positions are shown, in the first snapshot with examples."""
        longest = {layer: one.shape for graph in graphs.values() for layer, one in graph.examples.items()}
        if not longest or self._renderer is None:
            return
        self._places = {}
        try:
            sample = next(sample for _, sample in reader.read([batch], [0]))
            self._places = find_places(instrumented, batch, sample, render(self._renderer, sample), longest)
        except Exception as error:  # of the user's renderer, or of a model with other samples on their own
            log_traceback(error)

    def _reader(self, instrumented: InstrumentedModel, batch: Any) -> SampleReader:
        """Takes samples out of batches; the renderer and the names of outputs become known as well."""
        reader = SampleReader.of_model(instrumented, batch)
        if self._renderer is None:
            self._renderer = fitting_renderer(reader, batch, instrumented.model)
        if not self._knows_names:
            self._names = find_output_names(self._config.output_names, self._renderer, instrumented, batch)
            self._knows_names = True
        return reader if self._names is None else reader.with_names(self._names.of)

    def _on_failure(self, sample: int, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.warning(
                "%s: the renderer failed on sample %d, which is shown without a picture, as others that fail. This is "
                "not said again. %s", self._name, sample, brief(error),
            )  # fmt: skip
            log_traceback(error)

    def _write(self, prefix: str, of: str, missing: Sequence[int], renderings: Mapping[int, Mapping[str, Any]]) -> None:
        if not missing:
            return
        lines = [rendering_line(i, of, renderings[i]) for i in missing if i in renderings]
        append_lines(self._files[prefix], lines, self._starts_anew[prefix])
        self._starts_anew[prefix] = False
        self._done[prefix] |= {(i, of) for i in missing}


def _gather(found: Mapping[int, Mapping[str, Any]], process_group: ProcessGroup) -> dict[int, dict[str, Any]]:
    """Renderings of all processes."""
    if process_group.size == 1:
        return {i: dict(rendering) for i, rendering in found.items()}
    data = torch.tensor(list(json.dumps(list(found.items())).encode()), dtype=torch.uint8, device="cpu")
    parts: list[Tensor] = process_group.gather(data)
    return {i: rendering for part in parts for i, rendering in json.loads(bytes(part.tolist()).decode())}
