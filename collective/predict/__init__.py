"""`python -m collective.predict`: how a model's data-parallel training will scale, before the nodes are there.

One training step is profiled on the machine at hand, and a short sweep finds latencies and bandwidths (or they are
given). Then the step is replayed for any number of nodes: with the reducer's own plan of buckets, and with the costs of
the algorithms that docs/algorithms.md lists. docs/predict.md says what is modelled and what is left out.

It needs torch, and for tables the extra `bench` (rich; matplotlib for --plot).
"""

__all__: list[str] = []
