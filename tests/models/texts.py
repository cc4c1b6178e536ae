"""Texts for the comparison on SmolLM2: three of at least 320 tokens, and ten prompts to continue."""

# ruff: noqa: RUF001 - characters that look like others are part of the texts

from __future__ import annotations

PROSE = """The lighthouse at the end of the peninsula had been dark for eleven years when the letter
came. It was addressed to the keeper, although everyone in the village knew that there was no keeper
any more, and the postman, a careful man who did not like to return things, walked the four miles
along the cliff to leave it under the door. By the time he came back the tide had covered the lower
path. "Well," said the woman who ran the shop, "somebody will read it." Nobody asked her how she
could be so certain. The letter said that the lamp would be lit again on the first of November, that
a new lens had been ground in a town far inland, where most people had never seen the sea, and that
it would arrive by train in a crate packed with straw. There were instructions about the crate: it
must not be tilted, it must not be left in the sun, and under no circumstances was it to be opened
by anyone who was in a hurry. On the last Tuesday of October the crate arrived. It was smaller than
they had expected. Six people carried it up the hundred and twelve steps, resting on every landing,
and when they had set it down at the top they stood without speaking and looked out over the water,
which was grey and perfectly still. Then they began, slowly, to draw out the nails, one after
another, and to lay them in a row upon the floor, as if each of them might be needed again. By
evening the lens stood in its frame."""

CODE = '''import heapq
from collections import defaultdict


def shortest_paths(edges: list[tuple[str, str, float]], source: str) -> dict[str, float]:
    """Dijkstra's algorithm: distances from `source` to every node that can be reached."""
    graph: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for start, end, weight in edges:
        if weight < 0:
            raise ValueError(f"edge {start!r} -> {end!r} has a negative weight: {weight:.3f}")
        graph[start].append((end, weight))
        graph[end].append((start, weight))

    distances = {source: 0.0}
    queue = [(0.0, source)]
    while queue:
        distance, node = heapq.heappop(queue)
        if distance > distances[node]:
            continue  # an older, longer way
        for neighbour, weight in graph[node]:
            candidate = distance + weight
            if candidate < distances.get(neighbour, float("inf")):
                distances[neighbour] = candidate
                heapq.heappush(queue, (candidate, neighbour))
    return distances


if __name__ == "__main__":
    roads = [("A", "B", 7), ("A", "C", 9), ("A", "F", 14), ("B", "C", 10), ("B", "D", 15), ("C", "D", 11)]
    roads += [("C", "F", 2), ("D", "E", 6), ("E", "F", 9)]
    for town, kilometres in sorted(shortest_paths(roads, "A").items()):
        print(f"{town}: {kilometres:>6.1f} km")  # A 0.0, B 7.0, C 9.0, D 20.0, E 20.0, F 11.0
'''

MIXED = """<|im_start|>system
You answer in the language of the question.<|im_end|>
<|im_start|>user
Wie viele Einwohner hat Zürich, und wie heißt der Fluss?<|im_end|>
<|im_start|>assistant
Zürich hat rund 430'000 Einwohner; der Fluss heißt Limmat. 🏔️<|im_end|>
<|im_start|>user
東京の人口は何人ですか。川の名前は？<|im_end|>
<|im_start|>assistant
東京都の人口は約1,400万人です。隅田川と荒川が流れています。🗼<|im_end|>
<|im_start|>user
¿Y cuánto es 3.14159 × 2^10 − 27/4?  Por favor, paso a paso…<|im_end|>
<|im_start|>assistant
2^10 = 1024; 3.14159 × 1024 = 3216.98816; 27/4 = 6.75; el resultado es 3210.23816.<|im_end|>
<|im_start|>user
كم عدد أيام السنة؟ А сколько недель?<|im_end|>
<|im_start|>assistant
"""

PROMPTS = (
    "My favorite music is",
    "Once upon a time",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colors.<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4, 5,",
    "La ville de Paris est",
    "Water boils at",
    "To make a good cup of tea,",
    "The best way to learn a language is to",
)
"""At every step of the reference's greedy answers its two best logits are more than 2 bounds apart."""
