"""`attend`: masked attention over a Visibility, the one entry point of every backend.

A backend computes exactly what was asked or refuses with the reason. The reference is the law: plain torch, any float
dtype, compared with the others forward and backward by the tests. Shapes: queries `[B, H, Sq, D]`, keys and values
`[B, Hkv, Sk, D]` with `H` a multiple of `Hkv` (grouped-query attention).

`mass [B, Sq]` is the logarithm of a weight that is added to the denominator of each row's softmax, as if the row also
saw one more key, with that score and value 0: the rows then sum to less than 1 (pseudo-scores, attention sinks).

`bias [H, C, C]` is added to the scores by head, class of the query and class of the key, of the `C` token classes that
the visibility names. `attend_with_shares` also tells how much of each row's softmax goes to keys of each class, and
`attention_statistics` how sharp the rows are. (The mass is what a caller puts in; the shares are what comes out.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfuse.errors import unknown
from mmfuse.kernels.call import BackendError, Call
from mmfuse.kernels.classes import Statistics, with_class_columns
from mmfuse.kernels.dispatch import BACKEND_NAMES, BACKENDS, Backend, choose
from mmfuse.kernels.order import tile_order
from mmfuse.kernels.reference import attention_weights
from mmfuse.kernels.visibility import Visibility

__all__ = ["attend", "attend_with_shares", "attention_statistics", "attention_weights", "check_backend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of `q` over the keys that `visibility` shows it.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, D]`.
        visibility: of shape `(B, Sq, Sk)`; queries that see nothing give 0 and get gradient 0.
        scale: of the scores; 1/sqrt(D) if None.
        mass: `[B, Sq]`, the logarithm of what is added to each row's softmax denominator; nothing if None.
        bias: `[H, C, C]`, finite, added to the scores by head, class of the query and class of the key (of the `C`
            classes in `visibility.names`); differentiable; nothing if None.
        backend: a name in `BACKENDS`, or `auto` for the one that `choose` finds cheapest.

    Returns:
        `[B, H, Sq, D]` in the dtype of `q`.

    Raises:
        TypeError: the mask is not a Visibility, or the inputs differ in dtype.
        ValueError: unknown backend, or shapes that do not belong together.
        BackendError: the backend that was asked for by name cannot compute this; others are named.
    """
    if bias is None:
        _check(q, k, v, visibility, mass, None, backend)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        chosen = BACKENDS[_able(backend, visibility, Call.of(q, k, v, mass))]
        order = tile_order(visibility) if chosen.tiled else None
        if order is None:
            return chosen.run(q, k, v, visibility, scale, mass)
        mass = None if mass is None else order.sort_rows(mass)
        q, k, v = map(order.sort, (q, k, v))
        return order.restore(chosen.run(q, k, v, order.visibility, scale, mass))
    return attend_with_shares(q, k, v, visibility, scale=scale, mass=mass, bias=bias, backend=backend)[0]


def attend_with_shares(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attend`, and how each row's softmax is shared out among the token classes.

    No backend makes an `Sq × Sk` tensor for it that it would not make anyway: `reference` sums its weights, `triton`
    sums in its kernels, and for the others the classes of the keys become columns of keys and values.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        v: `[B, Hkv, Sk, D]`.
        visibility: as in `attend`.
        scale: as in `attend`.
        mass: `[B, Sq]`, as in `attend`.
        bias: `[H, C, C]`, as in `attend`.
        backend: as in `attend`.

    Returns:
        The output `[B, H, Sq, D]`, and the shares `[B, H, Sq, C]`: for each class of `visibility.names`, in that order,
        the sum of the row's softmax weights on keys of that class. Both are in the dtype of `q` and differentiable.
        The shares of a row sum to 1, to less where there is a `mass`, and to 0 where the row sees nothing.

    Raises:
        TypeError: as `attend`.
        ValueError: as `attend`.
        BackendError: as `attend`.
    """
    _check(q, k, v, visibility, mass, bias, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = BACKENDS[_able(backend, visibility, Call.of(q, k, v, mass, bias))]
    order = tile_order(visibility) if chosen.tiled else None
    if order is None:
        return _with_shares(chosen, q, k, v, visibility, scale, mass, bias)
    q, k, v = map(order.sort, (q, k, v))
    mass = None if mass is None else order.sort_rows(mass)
    out, shares = _with_shares(chosen, q, k, v, order.visibility, scale, mass, bias)
    return order.restore(out), order.restore(shares)


def _with_shares(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    scale: float,
    mass: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The backend's own way, or columns of keys and values."""
    if backend.with_shares is not None:
        return backend.with_shares(q, k, v, visibility, scale, mass, bias)
    width, classes = q.shape[3], len(visibility.names)
    out = backend.run(*with_class_columns(q, k, v, visibility, scale, bias), visibility, scale, mass)
    return out[..., :width], out[..., width : width + classes]


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Statistics:
    """How the softmax rows are spread: by class, their entropy and their largest score. For diagnosis: no gradients.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hkv, Sk, D]`.
        visibility: as in `attend`.
        scale: as in `attend`.
        mass: `[B, Sq]`, as in `attend`.
        bias: `[H, C, C]`, as in `attend`.
        backend: `reference`, some rows at a time, so that long sequences fit, or `triton`; `auto` is `reference`.

    Returns:
        Tensors over `[B, H, Sq]`; see `Statistics`.

    Raises:
        TypeError: as `attend`.
        ValueError: as `attend`.
        BackendError: another backend was asked for.
    """
    _check(q, k, k, visibility, mass, bias, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = Call.of(q, k, k, mass)
    if backend == "auto":
        backend = "reference"
    statistics = BACKENDS[_able(backend, visibility, call)].statistics
    if statistics is None:
        able = [name for name, other in BACKENDS.items() if other.statistics is not None]
        raise BackendError(f"attention backend {backend!r} keeps no statistics. Backends that do: {', '.join(able)}")
    return statistics(q, k, visibility, scale, mass, bias)


def _able(backend: str, visibility: Visibility, call: Call) -> str:
    """The backend to run: the one asked for if it can, or what `auto` stands for."""
    name = choose(visibility, call).backend if backend == "auto" else backend
    check_backend(name, visibility, call)
    return name


def check_backend(name: str, visibility: Visibility, call: Call) -> None:
    """Raise `BackendError` if the backend cannot run the call, with the reason and the names of those that can."""
    reason = None if name == "auto" else BACKENDS[name].refusal(visibility, call)
    if reason is not None:
        able = [other for other, candidate in BACKENDS.items() if candidate.refusal(visibility, call) is None]
        raise BackendError(f"attention backend {name!r} refuses: {reason}. Backends that can: {', '.join(able)}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, mass: Tensor | None, bias: Tensor | None, backend: str
) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(unknown("attention backend", backend, BACKEND_NAMES))
    if not isinstance(visibility, Visibility):
        raise TypeError(f"attend needs a Visibility, got {type(visibility).__name__}: masks are data here, not tensors")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TypeError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"expected q [B,H,Sq,D] and k, v [B,Hkv,Sk,D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {list(q.shape)} and k {list(k.shape)} must share B and D, and H must be a multiple of Hkv")
    if visibility.shape != (q.shape[0], q.shape[2], k.shape[2]):
        raise ValueError(
            f"visibility is {visibility.shape} (B, Sq, Sk), but q and k ask for {(q.shape[0], q.shape[2], k.shape[2])}"
        )
    if mass is not None and mass.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"mass must be [B, Sq] = {[q.shape[0], q.shape[2]]}, got {list(mass.shape)}")
    classes = len(visibility.names)
    if bias is not None and bias.shape != (q.shape[1], classes, classes):
        raise ValueError(f"bias must be [H, C, C] = {[q.shape[1], classes, classes]}, got {list(bias.shape)}")
