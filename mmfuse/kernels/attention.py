"""`attend`: masked attention over a Visibility, the one entry point of every backend.

A backend computes exactly what was asked or refuses with the reason. The reference is the law: plain torch, any float
dtype, compared with the others forward and backward by the tests. Shapes: queries `[B, H, Sq, D]`, keys and values
`[B, Hkv, Sk, D]` with `H` a multiple of `Hkv` (grouped-query attention).

`mass [B, Sq]` is the logarithm of a weight that is added to the denominator of each row's softmax, as if the row also
saw one more key, with that score and value 0: the rows then sum to less than 1 (pseudo-scores, attention sinks).
"""

from __future__ import annotations

from torch import Tensor

from mmfuse.errors import unknown
from mmfuse.kernels.call import BackendError, Call
from mmfuse.kernels.dispatch import BACKEND_NAMES, BACKENDS, choose
from mmfuse.kernels.reference import attention_weights
from mmfuse.kernels.visibility import Visibility

__all__ = ["attend", "attention_weights", "check_backend"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    *,
    scale: float | None = None,
    mass: Tensor | None = None,
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
        backend: a name in `BACKENDS`, or `auto` for the one that `choose` finds cheapest.

    Returns:
        `[B, H, Sq, D]` in the dtype of `q`.

    Raises:
        TypeError: the mask is not a Visibility, or the inputs differ in dtype.
        ValueError: unknown backend, or shapes that do not belong together.
        BackendError: the backend that was asked for by name cannot compute this; others are named.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(unknown("attention backend", backend, BACKEND_NAMES))
    _check(q, k, v, visibility, mass)
    call = Call.of(q, k, v, mass)
    name = choose(visibility, call).backend if backend == "auto" else backend
    check_backend(name, visibility, call)
    return BACKENDS[name].run(q, k, v, visibility, q.shape[-1] ** -0.5 if scale is None else scale, mass)


def check_backend(name: str, visibility: Visibility, call: Call) -> None:
    """Raise `BackendError` if the backend cannot run the call, with the reason and the names of those that can."""
    reason = None if name == "auto" else BACKENDS[name].refusal(visibility, call)
    if reason is not None:
        able = [other for other, candidate in BACKENDS.items() if candidate.refusal(visibility, call) is None]
        raise BackendError(f"attention backend {name!r} refuses: {reason}. Backends that can: {', '.join(able)}")


def _check(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, mass: Tensor | None) -> None:
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
