"""Conversion of weights from the authors' code, rru-reid and person-reid-lib, to this library's names and signs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import Tensor

# Official names, inside `RRU` or the network's `fuse_net`, to those of `rru_fast.RRU`.
ATTENTION = {  # 1x1 and full-size convolutions, flattened to matrices
    "s_atten_z.0.weight": "spatial_attention.0.weight",
    "s_atten_z.2.weight": "spatial_attention.2.weight",
    "c_atten_z.1.weight": "channel_attention.weight",
}
NAMES = {
    "reduce_dim_z.conv.weight": "transition.weight",
    "reduce_dim_z.bn.weight": "transition_norm.weight",
    "reduce_dim_z.bn.bias": "transition_norm.bias",
    "reduce_dim_z.bn.running_mean": "transition_norm.running_mean",
    "reduce_dim_z.bn.running_var": "transition_norm.running_var",
    "reduce_dim_z.bn.num_batches_tracked": "transition_norm.num_batches_tracked",
    **ATTENTION,
}
OPTIONAL = {"reduce_dim_z.bn.num_batches_tracked"}  # PyTorch before 0.4.1 did not save it


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of the authors' RRU for `rru_fast.RRU(channels).load_state_dict`.

    The authors' gate takes S_{t-1} - X_t where the paper has X_t - S_{t-1}, so that half of the transition's weights
    is negated; the outputs are the same.

    Args:
        state_dict: of the authors' `RRU`, of a module that contains one, or of the whole network; other entries are
            ignored.

    Returns:
        A state_dict for `rru_fast.RRU`, with copies of the tensors.

    Raises:
        TypeError: state_dict is not a mapping, or an entry of the RRU is not a tensor.
        ValueError: an entry is missing, there is more than one RRU, or a weight has another shape.

    >>> import rru_fast, torch
    >>> try:
    ...     rru_fast.from_official({"conv.weight": torch.zeros(1)})
    ... except ValueError as error:
    ...     print(error)
    state_dict: got no 'reduce_dim_z.conv.weight', wanted the weights of an RRU of rru-reid or person-reid-lib
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, wanted a mapping of names to tensors")
    anchor = "reduce_dim_z.conv.weight"
    prefixes = [
        key.removesuffix(anchor) for key in state_dict if isinstance(key, str) and f".{key}".endswith(f".{anchor}")
    ]
    wanted = "wanted the weights of an RRU of rru-reid or person-reid-lib"
    if not prefixes:
        raise ValueError(f"state_dict: got no {anchor!r}, {wanted}")
    if len(prefixes) > 1:
        raise ValueError(f"state_dict: got {len(prefixes)} RRUs, under {prefixes}, wanted one")
    prefix = prefixes[0]
    converted = {}
    for official, name in NAMES.items():
        if prefix + official in state_dict:
            value = state_dict[prefix + official]
            if not isinstance(value, Tensor):
                raise TypeError(f"state_dict[{prefix + official!r}]: got {type(value).__name__}, wanted a tensor")
            converted[name] = value.detach().clone()
        elif official not in OPTIONAL:
            raise ValueError(f"state_dict: got no {prefix + official!r}, {wanted}")
    _check_shapes(converted, prefix)
    transition = converted["transition.weight"]
    transition[:, : transition.shape[1] // 2].neg_()
    for name in ATTENTION.values():
        converted[name] = converted[name].flatten(1)
    return converted


def _check_shapes(tensors: dict[str, Tensor], prefix: str) -> None:
    """Raise ValueError unless the tensors, in the authors' shapes, fit each other."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    # -1 is any size, and fills up shapes of too few dimensions, which the loop refuses.
    d, channels, *_ = (*shapes["transition.weight"], -1, -1)
    hidden, _, *spatial = (*shapes["spatial_attention.0.weight"], -1, -1)
    wanted = {
        "transition.weight": ("(D, 2C, 1, 1)", (-1, channels + channels % 2, 1, 1)),
        "spatial_attention.0.weight": ("(A, 1, H, W)", (-1, 1, -1, -1)),
        "spatial_attention.2.weight": ("(H W, A, 1, 1)", (prod(spatial[:2]), hidden, 1, 1)),
        "channel_attention.weight": ("(C, D, 1, 1)", (channels // 2, d, 1, 1)),
        "transition_norm.num_batches_tracked": ("()", ()),
    }
    for official, name in NAMES.items():
        meaning, sizes = wanted.get(name, ("(D,)", (d,)))
        got = shapes.get(name, sizes)
        if len(got) != len(sizes) or any(size not in (-1, n) for n, size in zip(got, sizes, strict=True)):
            raise ValueError(f"{prefix}{official}: got shape {got}, wanted {meaning}")
