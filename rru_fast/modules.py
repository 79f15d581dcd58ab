"""Module interface: the reference modules, with the same weights and settings, and a faster forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rru_fast import backends, functional, reference
from rru_fast.auto import choice
from rru_fast.cuda_graphs import Graphs
from rru_fast.types import Refined


def check_cuda_graph(cuda_graph: bool, backend: str) -> None:
    """Raise ValueError unless `backend` is available, and supports CUDA graphs if `cuda_graph` is True."""
    backends.check_backend(backend)
    if not isinstance(cuda_graph, bool):
        raise ValueError(f"cuda_graph: got {cuda_graph!r}, wanted True or False")
    if cuda_graph and backend in ("reference", "cpu"):
        raise ValueError(
            f"cuda_graph: got True with backend={backend!r}, wanted 'auto', 'composite', 'triton' or 'cuda'"
        )


class RRU(reference.RRU):
    """Refining Recurrent Unit of eq. 1-5 with the strips of eq. 9, fused.

    A gate decides, per position and channel, how much of each new frame replaces the refined past:
    S_t = S_{t-1} + Z_t (X_t - S_{t-1}). `rru_fast.refine` has the equations.

    Args:
        channels: C of the feature maps.
        spatial: (H, W) of the feature maps, fixed by the spatial attention's weights; any for attention="channel".
        hidden: D, the transition's channels.
        spatial_hidden: A, the hidden size of the spatial attention.
        attention: "both", "spatial" (Z = sigmoid(z_s)) or "channel" (Z = sigmoid(z_c)).
        inputs: gate input: "appearance+motion", "appearance" or "raw" (the last two are the paper's RRU(ad), RRU(od)).
        bn_eps, bn_momentum: of the transition's batch norm. `transition_norm.momentum` may later be set to None, as
            `torch.optim.swa_utils.update_bn` does, for the mean over all batches.
        bn_groups: number of consecutive groups of clips with their own batch statistics, as DataParallel's replicas.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.
        cuda_graph: run forward and backward as CUDA graphs, captured at the first call of each shape; tensors must be
            on a GPU. Useful where launches, not arithmetic, take the time. The next call of the same shape overwrites
            the outputs: run the backward before it (a later one raises), and clone outputs that you need longer.
            During capture no other thread may call CUDA, as a DataLoader's pin_memory thread does.
        device, dtype: of the parameters, as in torch.nn; None for torch's defaults.

    Parameters: `transition.weight` (D, 2C, 1, 1), the appearance half first ((D, C, 1, 1) for inputs="appearance");
    `transition_norm.*`; `spatial_attention.{0,2}.weight` (A, P), (P, A); `channel_attention.weight` (C, D).

    forward(x, lengths=None, state=None) takes x (B, T, C, H, W), and in eval mode `lengths` (B,) and `state`, and
    returns `Refined(features (B, T, C, H, W), strips (B, C, H), state)`.

    Only the weights of the layers are read: their forward and hooks do not run, except the hooks of torch.nn.utils'
    weight_norm, spectral_norm and prune (parametrizations work too), and replacing a layer by one of another type is an
    error. Do not change x or the outputs in place before the backward: both are saved for it.

    If `transition_norm` is a SyncBatchNorm, as after `nn.SyncBatchNorm.convert_sync_batchnorm(model)`, the ranks of its
    process group share batch statistics, also on a CPU: see `rru_fast.refine`. On a CPU convert after wrapping in
    DistributedDataParallel, which refuses SyncBatchNorm there. Excludes `bn_groups` and, with several ranks,
    `cuda_graph`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").

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
        # A graph cannot be replayed with the momenta of another call.
        replayable = not isinstance(arguments["momentum"], list)
        graphs = self.cuda_graph and replayable and not torch.compiler.is_compiling()
        if graphs and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            if self.backend == "auto":  # before the graph, whose key has the backend
                arguments["backend"] = functional.choose_for_graph(x, arguments)
            if not choice.is_collecting():
                return self._graphs.refine(functional.refine, x, arguments)
        return functional.refine(x, **arguments)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}" + ", cuda_graph=True" * self.cuda_graph


class BatchHardTripletLoss(reference.BatchHardTripletLoss):
    """Batch-hard triplet loss of eq. 8, and of eq. 10 over all strips at once.

    Args:
        margin: a number, or "soft" for softplus.
        metric: "euclidean", on features that are not normalized, or "cosine".
        gather: form the batch from all ranks of torch.distributed, with gradients. Under DistributedDataParallel loss
            and gradients then equal those of a single process. Ranks may have different numbers of features, also 0.
            Each rank mines for its own anchors in the features of all ranks, or in the galleries of all ranks, and
            returns the whole batch's loss. Takes three small collectives in addition to that of the features: of sizes,
            for which the host waits, of labels, and of two distances per anchor; the last is repeated in the backward,
            as is that of the features.
        backend: "auto", or a backend that `rru_fast.show_config` lists as available.
        reduction: "mean" or "sum" over all anchors and groups, or "none". Under DistributedDataParallel, which averages
            gradients over ranks, "sum" with `gather` gives the gradients of the whole batch's sum, too.
        return_distances: also return each anchor's distances to its hardest positive and negative.

    forward(features, labels, gallery=None, gallery_labels=None) takes features (N, D) or (G, N, D) and integer labels
    (N,), and returns the loss, with `return_distances` the tuple (loss, D_pos, D_neg), as `rru_fast.batch_hard_triplet`
    does. With a gallery, (M, D) or (G, M, D) with labels (M,), hardest positives and negatives are mined there.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it wanted. With
            `gather`, on every rank if groups, columns or dtypes differ between ranks, or only some have a gallery.
        RuntimeError: for second-order gradients, forward-mode AD and torch.func.grad (use backend="reference").

    >>> import torch, rru_fast
    >>> loss = rru_fast.BatchHardTripletLoss(margin=0.4)
    >>> loss(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1]))
    tensor(0.)
    """

    def _choose_backend(self, backend: str) -> None:
        backends.check_backend(backend)
        self.backend = backend

    def _loss(self, features: Tensor, labels: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        return functional.batch_hard_triplet(features, labels, **options, backend=self.backend)

    def _distances(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return functional.hardest_distances(*batch, margin=self.margin, metric=self.metric, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"
