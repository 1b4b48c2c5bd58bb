"""The graph of a sample in the files of circuit-tracer, for its viewer.

A folder of its viewer has ``graph-metadata.json``, the list of graphs, and for each of them ``SLUG.json``. It shows
more of a feature where there is ``SLUG/NUMBER.json``: its histogram, and the outputs that it raises and lowers.

Format: ``frontend/graph_models.py`` and ``frontend/feature_models.py`` of
https://github.com/safety-research/circuit-tracer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lib_lightning.errors import LIBError, SettingError, SettingTypeError, counted
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.sample_graph.prune import cumulative
from lib_lightning.sample_graph.sample_graph import SampleGraph, SampleNode

# What its viewer draws as a circle, as a diamond, and as squares at the bottom and at the top.
_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "input": "embedding",
    "output": "logit",
}
METADATA = "graph-metadata.json"


def write_graph(
    path: Path,
    graph: SampleGraph,
    everything: SampleGraph,
    tokens: Any = None,
    details: Callable[[str, int], dict[str, Any]] = lambda layer, index: {},
) -> None:
    """Write the files of one graph, and add it to the list of its folder. Existing files are replaced.

    Args:
        path: The file, whose name without ``.json`` is that of the graph.
        graph: What to write.
        everything: The graph before it was pruned, whose influence is 1.
        tokens: Texts of the positions, or a tokenizer; None for the numbers of tokens or positions.
        details: From node layer and index to what is known of a feature beyond this sample, as in
            circuit-tracer's files of features.

    Raises:
        SettingError: If the file's name does not end in ``.json``, or there are too many or too few texts.
    """
    if path.suffix != ".json" or path.name == METADATA:
        raise SettingError(f"circuit-tracer reads files that end in .json, such as graphs/one.json; got '{path}'.")
    document, numbers = _document(path.stem, graph, everything, tokens)
    folder = path.parent / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    for number, place in numbers.items():
        known = {"transcoder_id": path.stem, "index": number, "examples_quantiles": [], **details(*place)}
        (folder / f"{number}.json").write_bytes(_json(known))
    write_bytes(path, _json(document))
    _add_to_list(path.parent / METADATA, document["metadata"])


def _document(
    slug: str, graph: SampleGraph, everything: SampleGraph, tokens: Any
) -> tuple[dict[str, Any], dict[int, tuple[str, int]]]:
    """The graph in circuit-tracer's format, and its numbers of features, with their node layers and indices."""
    names, text = _position_names(graph, tokens), _texts(graph, tokens)
    # With a single position, the viewer would take everything for features that are the same at all positions.
    shift = 1 if len(names) == 1 else 0
    shares = cumulative(torch.tensor([n.influence for n in everything.nodes], dtype=torch.float64, device="cpu"))
    share = {node.key: x for node, x in zip(everything.nodes, shares.tolist(), strict=True)}
    layers = {name: i for i, name in enumerate(graph.node_layers)}
    outputs = [node for node in graph.nodes if node.kind == "output"]
    top = max(outputs, key=lambda node: graph.info["weights"][node.index])
    nodes, numbers = [], {}
    for node in graph.nodes:
        layer = len(layers) + 1 if node.kind == "output" else layers[node.layer]
        found = _node(node, layer, shift, graph.info["tokens"])
        found["clerp"], found["is_target_logit"] = text(node, names), node is top
        found["influence"] = None if node.kind == "output" else share[node.key]
        nodes.append(found)
        if node.kind == "feature":
            numbers[found["feature"]] = node.layer, node.index
    metadata = {
        "slug": slug,
        # From here the viewer loads what is known of a feature.
        "scan": f"./data/{slug}",
        "transcoder_list": [],
        "prompt_tokens": [""] * shift + names,
        "prompt": "".join(names) if tokens is not None else f"{graph.info['model']} {slug}",
        # The largest value of its slider, with which it shows all nodes.
        "node_threshold": max((n["influence"] for n in nodes if n["influence"] is not None), default=1.0),
        "schema_version": 1,
    }
    opened = nodes[graph.nodes.index(top)]["node_id"]
    ends = zip(graph.sources.tolist(), graph.targets.tolist(), graph.weights.tolist(), strict=True)
    document = {
        "metadata": metadata,
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": opened, "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": nodes[s]["node_id"], "target": nodes[t]["node_id"], "weight": w} for s, t, w in ends],
    }
    return document, numbers


def _node(node: SampleNode, layer: int, shift: int, tokens: Sequence[int] | None) -> dict[str, Any]:
    """A node as circuit-tracer writes it, without text and influence."""
    place = node.place + shift
    number = int(node.id.rpartition("/")[2]) if node.kind == "feature" else node.index
    slot = {"error": -1, "input": tokens[node.place] if tokens else node.place}.get(node.kind, number)
    name = "E" if node.kind == "input" else str(layer)
    feature = {"feature": _pair(layer, number), "input": place}.get(node.kind, slot)
    js = {"feature": f"{name}_{slot}-0", "output": f"L_{slot}-{place}"}.get(node.kind, f"{name}_{slot}-{place}")
    return {
        "node_id": f"{name}_{slot}_{place}",
        "feature": feature,
        "layer": name,
        "ctx_idx": place,
        "feature_type": _TYPES[node.kind],
        "token_prob": node.probability or 0.0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js,
        "activation": node.value if node.kind == "feature" else None,
    }


def _pair(x: int, y: int) -> int:
    """Cantor's number of a pair, by which the viewer knows layer and number of a feature."""
    return (x + y) * (x + y + 1) // 2 + y


def _position_names(graph: SampleGraph, tokens: Any) -> list[str]:
    """A text for each place."""
    numbers, shape = graph.info["tokens"], graph.info["shape"]
    if tokens is None:
        if numbers:
            return [str(number) for number in numbers]
        if len(shape) > 1:
            return [str(tuple(place)) for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist()]
        return ["sample"] if graph.num_places == 1 else [str(place) for place in range(graph.num_places)]
    if text_of := text_of_tokens(tokens):
        if not numbers:
            raise LIBError("A tokenizer was given, but the model's input has no numbers of tokens.")
        return [text_of(number) for number in numbers]
    is_list = isinstance(tokens, (list, tuple)) and all(isinstance(token, str) for token in tokens)
    if not is_list:
        raise SettingTypeError(f"tokens is a list of texts or a tokenizer; got {type(tokens).__name__}.")
    if len(tokens) != graph.num_places:
        raise SettingError(f"There are {counted(len(tokens), 'text')} for {counted(graph.num_places, 'position')}.")
    return list(tokens)


def text_of_tokens(tokens: Any) -> Callable[[int], str] | None:
    """The function from the number of a token to its text.

    Args:
        tokens: A tokenizer, or a `lib_lightning.features.TokenRenderer`.

    Returns:
        The function; None for anything else.

    Example:
        >>> text_of_tokens(["a", "b"]) is None
        True
    """
    if callable(own := getattr(tokens, "text", None)):
        return lambda number: str(own(number))
    if callable(decode := getattr(tokens, "decode", None)) and not isinstance(tokens, bytes):
        return lambda number: str(decode([number]))
    return None


def _texts(graph: SampleGraph, tokens: Any) -> Callable[[SampleNode, Sequence[str]], str]:
    """What is written beside a node."""
    text_of = text_of_tokens(tokens)

    def text(node: SampleNode, names: Sequence[str]) -> str:
        if node.kind == "feature":
            return f"{node.label} ({node.id})" if node.label else node.id
        if node.kind == "error":
            return f"Left out of {node.layer} at “{names[node.place]}”"
        if node.kind == "input":
            return f"“{names[node.place]}”"
        is_token = text_of is not None and graph.info["tokens"] and node.id == f"output/{node.index}"
        name = text_of(node.index) if text_of and is_token else node.id
        share = node.probability if node.probability is not None else graph.info["weights"][node.index]
        value = "" if node.probability is not None else f" = {node.value:+.3g}"
        # The viewer reads the name between the first quotation marks, and the number after "(p=".
        return f"""Output "{name.replace('"', "'").replace("(p=", "(p =")}{value}" (p={share:.3f})"""

    return text


def _add_to_list(path: Path, metadata: Mapping[str, Any]) -> None:
    known: dict[str, Any] = {"graphs": []}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            others = [graph for graph in known["graphs"] if graph["slug"] != metadata["slug"]]
        except (ValueError, KeyError, TypeError) as error:
            raise LIBError(f"'{path}' is no list of graphs of circuit-tracer; move it to write a new one.") from error
    else:
        others = []
    write_bytes(path, _json({**known, "graphs": [*others, dict(metadata)]}))


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
