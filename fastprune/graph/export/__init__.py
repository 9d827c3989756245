"""The model becomes an operator graph.

* ``inputs``: the example that a network is traced with.
* ``refusals``: models that cannot be traced, and the errors that say why.
* ``regions``: parts of a graph that run under ``no_grad`` or ``autocast``, inlined into it.
* ``nodes``: facts about one node of a graph.
* ``exporter``: one call of ``torch.export``.
* ``open_sizes``: a graph that holds for other sizes of its inputs.
* ``tracing``: the graphs of a model in eval mode and in train mode.
"""
