# ruff: noqa: T201
"""Does the bundled induction model do what we think it does? A hypothesis, where it lives, and a search for it.

Run: python examples/hypothesis.py
"""

import torch

import unweave
from unweave.hypotheses import CausalModel, Location, find_alignment, interchange_accuracy


def previous(tokens):
    """Per position, the token before it (-1 at the start)."""
    return torch.cat([torch.full_like(tokens[:, :1], -1), tokens[:, :-1]], dim=1)


def following(tokens, previous):
    """The token that stands where the current one was the previous; -1, no answer, where none or several do."""
    match = (previous[:, None] == tokens[:, :, None]).float().tril()
    said = match @ torch.nn.functional.one_hot(tokens, 48).float() > 0
    return torch.where(said.sum(-1) == 1, said.int().argmax(-1), -1)


model = CausalModel({"previous": previous, "next": following}, output="next")
graph = unweave.capture("zoo:induction")
found, held_out = unweave.load_data("zoo:induction", limit=192).split(held_out=0.5)

result = interchange_accuracy(graph, model, {"previous": Location("blocks.0.attn.head.0")}, held_out)
print(f"network and hypothesis agree on {result.agreement.value:.1%} of the positions it speaks of")
for row in result.table():
    print(f"swapping {row['variables']}: right {row['iia']:.1%} of the time; elsewhere {row['elsewhere']:.1%}")

places = ["embed", "blocks.0.attn.head.0", "blocks.0.attn.head.1", "blocks.1.attn.head.1"]
search = find_alignment(graph, model, "previous", found, k=12, places=places, steps=60, n_pairs=64)
for row in search.table():
    print(f"{row['dimensions'] or 'all'} dimensions of {row['place']}: {row['iia']:.1%}", end="; ")
    print(f"random network {row['random_network']:.1%}, wrong answers {row['mislabelled']:.1%}")
