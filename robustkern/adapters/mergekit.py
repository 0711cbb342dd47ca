"""A merge method for mergekit (0.1.5): ``merge_method: robust`` with any rule.

Importing this module registers the method. ``python -m robustkern.adapters.mergekit config.yml out`` is
``mergekit-yaml`` with it:

.. code-block:: yaml

    merge_method: robust
    parameters: {rule: ctma(geometric_median), f: 1}
    models: [{model: a}, {model: b}, {model: c}, {model: d}]
    dtype: bfloat16

mergekit merges tensor by tensor, so that a model is judged anew in each: the guarantee of a rule holds for the whole if
it holds for its parts, and one verdict over whole models is what ``robustkern aggregate`` gives.
"""

from __future__ import annotations

import math

from robustkern.adapters import needs

with needs("mergekit"):
    import torch
    from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register

from robustkern.adapters.torch import aggregate
from robustkern.errors import plain
from robustkern.rules.base import as_aggregator

__all__ = ["robust"]


@merge_method(  # type: ignore[untyped-decorator]
    name="robust",
    pretty_name="Byzantine-robust aggregation",
    reference_url="https://arxiv.org/abs/2405.14759",
    contract=InputContract(base=BasePolicy.OPTIONAL),
    uses_accelerator=False,
)
def robust(group: TensorGroup, rule: str = "median", f: int = 1, weight: PerNonBase[float] = 1.0) -> torch.Tensor:
    """Combine the tensors of a group but the base model's, from which rules with a centre measure.

    Parameters
    ----------
    group : TensorGroup
        Of one dtype and shape.
    rule : str
        As for `robustkern.aggregate`.
    f : int
        How many of the models may be bad.
    weight : float for each model but the base
        For rules that take weights; equal weights above 0 are none.

    Returns
    -------
    torch.Tensor
        With gradients, see `robustkern.adapters.torch.aggregate`.

    Raises
    ------
    TypeError, ValueError
        As `robustkern.aggregate`, with the tensor's name; where a rule that needs a base model has none.
    """
    found = as_aggregator(rule)
    centre: torch.Tensor | None = None
    if "centre" in found.points:
        if group.base is None:
            raise ValueError(f"robust: {found} measures from a centre (name a base_model)")
        centre = group.base.tensor
    rows = group.non_base
    shares = [weight[entry.id] for entry in rows]
    alike = len(set(shares)) <= 1 and all(0 < share < math.inf for share in shares)
    weights = None if alike else torch.tensor(shares, dtype=torch.float64)
    try:
        return aggregate([entry.tensor for entry in rows], found, f=f, weights=weights, centre=centre)
    except ValueError as error:
        raise ValueError(f"tensor {plain(str(group.metadata.name), 200)}: {error}") from error


register(robust)

if __name__ == "__main__":
    from mergekit.scripts.run_yaml import main

    main()
