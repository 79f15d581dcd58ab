"""The operators as modules: the reference modules with a faster forward, so weights and settings are theirs."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rru_fast import backends, functional, reference
from rru_fast.cuda_graphs import Graphs
from rru_fast.types import Refined


def check_cuda_graph(cuda_graph: bool, backend: str) -> None:
    """Raise ValueError unless the backend can serve here, by CUDA graphs if asked."""
    backends.check_backend(backend)
    if not isinstance(cuda_graph, bool):
        raise ValueError(f"cuda_graph: got {cuda_graph!r}, wanted True or False")
    if cuda_graph and backend in ("reference", "cpu"):
        raise ValueError(f"cuda_graph: got True with backend={backend!r}, wanted 'auto', 'composite' or 'triton'")


class RRU(reference.RRU):
    """The Refining Recurrent Unit of eq. 1-5 with the strips of eq. 9, fused.

    A gate decides, per position and channel, how much of each new frame replaces the refined past:
    S_t = S_{t-1} + Z_t (X_t - S_{t-1}). The equations are in `rru_fast.refine`.

    Args:
        channels: C of the maps.
        spatial: (H, W) of the maps, fixed by the spatial attention's weights; any for attention="channel".
        hidden: D, the transition's channels.
        spatial_hidden: A, the hidden size of the spatial attention.
        attention: "both", "spatial" (Z = sigmoid(z_s)) or "channel" (Z = sigmoid(z_c)).
        inputs: what the gate sees: "appearance+motion", "appearance" or "raw" (the paper's RRU(ad) and RRU(od)).
        bn_eps, bn_momentum: of the transition's batch norm; `transition_norm.momentum` may be None later, as
            `torch.optim.swa_utils.update_bn` sets it, for the mean over all batches.
        bn_groups: consecutive groups of clips with batch statistics of their own, as replicas under DataParallel have.
        backend: "auto", or a backend `rru_fast.show_config` lists as available.
        cuda_graph: run forward and backward as CUDA graphs, captured at the first call of each shape, for tensors on a
            GPU: worth it where launches, not arithmetic, take the time. What a call returns is overwritten by the next
            of the same shape, so run the backward before it (a later one raises), and copy what is to be kept. While
            a shape is captured no other thread may call CUDA, as one that pins memory for a loader does.

    Parameters: `transition.weight` (D, 2C, 1, 1), the appearance half first ((D, C, 1, 1) for inputs="appearance");
    `transition_norm.*`; `spatial_attention.{0,2}.weight` (A, P), (P, A); `channel_attention.weight` (C, D).

    Called with x (B, T, C, H, W), and in eval mode optionally `lengths` (B,) and `state`, it returns
    `Refined(features (B, T, C, H, W), strips (B, C, H), state)`.

    Its layers are read and not called: their hooks do not run (but those of torch.nn.utils' old weight_norm,
    spectral_norm and prune do, and parametrizations work), and a layer of another kind in their place is an error. No
    operation may change what it returned, or x, in place before the backward: both are saved for it.

    Where `transition_norm` is a SyncBatchNorm, as `nn.SyncBatchNorm.convert_sync_batchnorm(model)` makes it, batch
    statistics are those of the clips of all ranks of its process group, on a CPU too: see `rru_fast.refine`. On a CPU
    convert after wrapping in DistributedDataParallel, which takes no SyncBatchNorm there. Excludes `bn_groups` and,
    where there are several ranks, `cuda_graph`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: on second-order gradients, forward mode and torch.func.grad (backend="reference" has them).

    >>> import torch, rru_fast
    >>> out = rru_fast.RRU(16, spatial=(4, 2), hidden=8)(torch.rand(2, 5, 16, 4, 2))
    >>> out.features.shape, out.strips.shape
    (torch.Size([2, 5, 16, 4, 2]), torch.Size([2, 16, 4]))
    """

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        check_cuda_graph(cuda_graph, backend)
        self.backend, self.cuda_graph, self._graphs = backend, cuda_graph, Graphs()

    def _refine(self, x: Tensor, **arguments: object) -> Refined:
        arguments["backend"] = self.backend
        # Where each call has other momenta, nothing can be replayed.
        replayable = not isinstance(arguments["momentum"], list)
        graphs = self.cuda_graph and replayable and not torch.compiler.is_compiling()
        if graphs and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._graphs.refine(functional.refine, x, arguments)
        return functional.refine(x, **arguments)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}" + ", cuda_graph=True" * self.cuda_graph


class BatchHardTripletLoss(reference.BatchHardTripletLoss):
    """Batch-hard triplet loss of eq. 8, and of eq. 10 over all strips at once.

    Args:
        margin: a number, or "soft" for softplus.
        metric: "euclidean" on features as they come, or "cosine".
        gather: form the batch from all ranks of torch.distributed, with gradient: under DistributedDataParallel, P
            processes then give the loss and the gradients of one. Ranks may bring different numbers of features, also
            none. Costs two small collectives more than that of the features, and the host waits for the first.
        backend: "auto", or a backend `rru_fast.show_config` lists as available.

    Called with features (N, D) or (G, N, D) and integer labels (N,), it returns the scalar mean over anchors.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted. With
            `gather` on every rank, where groups, columns or dtypes are not the same on all.
        RuntimeError: on second-order gradients, forward mode and torch.func.grad (backend="reference" has them).

    >>> import torch, rru_fast
    >>> loss = rru_fast.BatchHardTripletLoss(margin=0.4)
    >>> loss(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]))
    tensor(0.)
    """

    def _choose_backend(self, backend: str) -> None:
        backends.check_backend(backend)
        self.backend = backend

    def _loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return cast(
            Tensor,
            functional.batch_hard_triplet(
                features, labels, margin=self.margin, metric=self.metric, backend=self.backend
            ),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"
