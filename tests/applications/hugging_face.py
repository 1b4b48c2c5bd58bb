"""Sixty model types of Hugging Face transformers, tiny and with random weights, against dense Jacobians in float64.

Node layers are the proposed ones. The dense Jacobians are those of autograd between the tensors that hooks see while
the model runs as usual: for a proper cut, these are the derivatives that the paper's formulas need.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.api import propose_node_layers
from lib_lightning.errors import LIBError
from lib_lightning.model.batch import replace_first_tensor
from lib_lightning.model.node_layer import as_node_layers
from tests.integration.oracle import assert_exact, entries, tensors_in

VOCABULARY, HIDDEN, LENGTH, IMAGE, SAMPLES = 37, 8, 3, 8, 24
RTOL = 1e-8
# Errors relative to the largest entry. Some models compute parts in float32 whatever the type of their weights.
TOLERANCES = (1e-8, 1e-6, 1e-4)

# Sizes under the names that configurations give them.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "hidden_size": HIDDEN, "d_model": HIDDEN, "n_embd": HIDDEN, "dim": HIDDEN, "embedding_size": HIDDEN,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_kv": 4,
    "intermediate_size": 12, "n_inner": 12, "ffn_dim": 12, "hidden_dim": 12, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "d_ff": 12, "ffn_hidden_size": 12, "word_embed_proj_dim": HIDDEN,
    "max_position_embeddings": 16, "n_positions": 16, "n_ctx": 16, "max_seq_len": 16, "rotary_dim": 2,
    "image_size": IMAGE, "patch_size": 4, "num_channels": 2, "num_labels": 3,
}  # fmt: skip

TEXT, IMAGES, SEQUENCES, SOUND = "text", "images", "sequences", "sound"
CAUSAL, MASKED, PLAIN, CLASSES, PAIRS = (
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel", "AutoModelForImageClassification",
    "AutoModelForSeq2SeqLM",
)  # fmt: skip

Row = tuple[str, str, str, dict[str, Any]]


def rows(auto: str, kind: str, *names: str, **special: dict[str, Any]) -> list[Row]:
    return [(name, auto, kind, special.get(name.replace("-", "_"), {})) for name in names]


CONFIGURATIONS: list[Row] = [
    *rows(
        CAUSAL, TEXT,
        "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "gpt_bigcode", "opt", "bloom", "biogpt", "helium", "llama",
        "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "falcon", "mpt", "stablelm",
        "starcoder2", "olmo", "olmo2", "cohere", "granite", "persimmon", "nemotron", "glm", "mamba", "rwkv",
        gpt_neo={"attention_types": [[["global", "local"], 1]], "window_size": 2},
        phi={"partial_rotary_factor": 0.5}, stablelm={"partial_rotary_factor": 0.5},
        persimmon={"partial_rotary_factor": 0.5}, nemotron={"partial_rotary_factor": 0.5},
        glm={"partial_rotary_factor": 0.5}, mixtral={"num_local_experts": 2, "experts_implementation": "eager"},
        codegen={"num_attention_heads": 4},
        mamba={"state_size": 4, "time_step_rank": 2}, rwkv={"attention_hidden_size": HIDDEN, "context_length": 16},
    ),
    *rows(
        MASKED, TEXT,
        "bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2", "convbert", "roformer", "rembert",
        "fnet", "modernbert", "nystromformer", "megatron-bert",
        modernbert={"global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2},
        rembert={"input_embedding_size": HIDDEN, "output_embedding_size": HIDDEN},
        nystromformer={"num_landmarks": LENGTH, "segment_means_seq_len": LENGTH},
        convbert={"head_ratio": 1, "num_groups": 1},
    ),
    *rows(
        CLASSES, IMAGES,
        "vit", "deit", "beit", "swin", "convnext", "resnet", "regnet", "dinov2",
        resnet={"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"},
        regnet={"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "groups_width": 2},
        convnext={"hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        swin={
            "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "num_attention_heads": [1, 2], "window_size": 2,
            "patch_size": 2,
        },
    ),
    *rows(
        PAIRS, SEQUENCES, "t5", "bart", "mbart", "pegasus", "marian",
    ),
    *rows(
        PLAIN, SOUND, "whisper",
        whisper={"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16},
    ),
]  # fmt: skip


def _can_be_set(config: Any, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    return not isinstance(attribute, property) or attribute.fset is not None


def model_of(model_type: str, auto: str, special: dict[str, Any]) -> nn.Module:
    """A tiny model with random weights in float64."""
    import transformers

    config = transformers.AutoConfig.for_model(model_type)
    known = {name: value for name, value in SIZES.items() if hasattr(config, name) and _can_be_set(config, name)}
    config = type(config)(**{**known, **special})
    config.architectures = []
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, auto).from_config(config).double().eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch_of(kind: str) -> dict[str, Tensor]:
    """Keyword arguments of the model."""
    generator = torch.Generator().manual_seed(1)

    def tokens() -> Tensor:
        return torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=generator)

    if kind == IMAGES:
        return {"pixel_values": torch.randn(SAMPLES, 2, IMAGE, IMAGE, generator=generator).double()}
    if kind == SEQUENCES:
        return {"input_ids": tokens(), "decoder_input_ids": tokens()}
    if kind == SOUND:
        sound = torch.randn(SAMPLES, 4, 8, generator=generator).double()
        return {"input_features": sound, "decoder_input_ids": tokens()}
    return {"input_ids": tokens()}


Seen = dict[tuple[int, int], Tensor]


def run(model: nn.Module, batch: dict[str, Tensor], node_layers: list[NodeLayer], cut: int | None = None) -> Seen:
    """Run a model; return the tensor at each tap.

    Args:
        model: The model.
        batch: Its keyword arguments.
        node_layers: The node layers.
        cut: Node layer of several taps, all outputs of modules: in the place of each comes a new leaf, so that none
            depends on another.
    """
    seen: Seen = {}
    handles = []
    for l, layer in enumerate(node_layers):
        for k, tap in enumerate(layer.taps):
            path, _, side = (":" + tap if tap in ("input", "output") else tap).partition(":")
            path, _, number = path.partition("#")
            calls: list[int] = []

            def look(value: Any, at: tuple[int, int], call: int, calls: list[int]) -> Any:
                calls.append(0)
                if len(calls) - 1 != call:
                    return None
                t = tensors_in(value)[0]
                seen[at] = t if t.requires_grad or not t.is_floating_point() else t.requires_grad_()
                if at[0] != cut:
                    return None
                seen[at] = t.detach().requires_grad_()
                return replace_first_tensor(value, seen[at])

            options: Any = {"at": (l, k), "call": int(number or 0), "calls": calls}
            module = model.get_submodule(path)
            if side == "input":
                before = partial(lambda look, m, args, kwargs: look((args, kwargs)), partial(look, **options))
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                after = partial(lambda look, m, args, out: look(out), partial(look, **options))
                handles.append(module.register_forward_hook(after))
    try:
        with torch.enable_grad():
            model(**{name: t.clone() for name, t in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return seen


def dense(
    model: nn.Module, batch: dict[str, Tensor], node_layers: list[NodeLayer]
) -> tuple[list[Tensor], list[Tensor]]:
    """Activations ``(n, S, d)`` of each node layer, and Jacobians ``(n, S', d', S, d)`` of each section."""
    activations, jacobians = [], []
    for l, layer in enumerate(node_layers):
        seen = run(model, batch, node_layers, cut=l if len(layer.taps) > 1 else None)
        here = {at: t for at, t in seen.items() if at[0] == l}
        activations.append(activation(layer, seen, l))
        if l + 1 == len(node_layers):
            break
        after = activation(node_layers[l + 1], seen, l + 1)
        rows = []
        for t in range(after.shape[1]):
            for i in range(after.shape[2]):
                grads = torch.autograd.grad(
                    after[:, t, i].sum(), list(here.values()), retain_graph=True, allow_unused=True
                )
                filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, here.values(), strict=True)]
                rows.append(activation(layer, dict(zip(here, filled, strict=True)), l))
        jacobians.append(torch.stack(rows, 1).unflatten(1, after.shape[1:]))
    # Some models compute their output in float32.
    return [a.detach().double() for a in activations], [J.double() for J in jacobians]


def activation(layer: NodeLayer, seen: Seen, l: int) -> Tensor:
    """Node layer ``l`` with its taps joined, ``(n, S, d)``."""
    taps = [seen[l, k] for k in range(len(layer.taps))]
    return torch.cat([t.flatten(1)[:, entries(layer, t)] for t in taps], -1 if layer.join == "features" else 1)


def check(row: Row) -> dict[str, Any]:
    """Compare the graph of one model type with the dense Jacobians.

    Args:
        row: Model type, class, kind of input, special sizes.

    Returns:
        Whether it works, to which tolerance, and the reason if not.
    """
    model_type, auto, kind, special = row
    started = time.perf_counter()
    result: dict[str, Any] = {"name": model_type, "group": "transformers", "kind": kind}
    try:
        model = model_of(model_type, auto, special)
        batch = batch_of(kind)
        model(**batch)
    except Exception as error:
        return {**result, "status": "not run", "reason": f"{type(error).__name__}: {error}"[:400]}
    try:
        given = propose_node_layers(model, dict(batch))
        layers = as_node_layers(given)
        result["node_layers"] = [layer.name for layer in layers]
        graph = compute_interaction_graph(model, [batch], layers, rtol=RTOL)
        expected = dense(model, batch, layers)
        result |= compare(lambda tolerance: assert_exact(graph, *expected, tolerance=tolerance))
    except LIBError as error:
        result |= {"status": "refused", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    return {**result, "seconds": round(time.perf_counter() - started, 2)}


def compare(check_to: Callable[[float], None]) -> dict[str, Any]:
    """The smallest of the tolerances to which a check passes."""
    reason = ""
    for tolerance in TOLERANCES:
        try:
            check_to(tolerance)
        except AssertionError as error:
            reason = str(error).split("\n")[0] or "assertion failed"
        else:
            return {"status": "works", "tolerance": tolerance}
    return {"status": "wrong", "reason": reason}


if __name__ == "__main__":
    import json

    warnings.simplefilter("ignore")
    for row in CONFIGURATIONS:
        if row[0] in sys.argv[1:] or not sys.argv[1:]:
            print("RESULT " + json.dumps(check(row)), flush=True)
