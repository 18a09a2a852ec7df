"""Arms of an experiment against each other: runs that differ in nothing but the seed are an arm.

Read ``blocks`` first: which arms can be compared; ``pairing`` compares them client by client with
the intervals of ``differences``, ``rates`` selects learning rates, ``convergence`` counts rounds
and steps, ``section`` puts it together for the page. Nothing needs torch.
"""
