"""Channel labels flow through the operator graph.

* ``labels``: label tensors, and the space in which labels are united and pinned.
* ``selection``: the origin of moved values.
* ``propagate``: the findings while labels flow.
* ``rules``: the table of rules, and the rule of elementwise operators.
* ``layers``, ``channelwise``, ``moves`` (with ``own_code``): the rules of PyTorch's operators.
* ``computed``: weights that the network computes from a parameter.
* ``custom``: rules for users' own operators, the public part.
* ``interpret``: the walk over a graph that applies the rules.
"""
