"""Pictures of a Visibility: as text for a terminal, and as an image file."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmfuse.kernels.visibility import Axis, Visibility

_MAX_CELLS = 96


def _letters(visibility: Visibility, axis: Axis, sample: int) -> str:
    """One letter a token: the first letter of its class, a dot for padding."""
    document, cls = axis.document[sample].tolist(), axis.cls[sample].tolist()
    return "".join("." if d < 0 else visibility.names[c][0].upper() for d, c in zip(document, cls, strict=True))


def ascii_mask(visibility: Visibility) -> str:
    """Rows are queries, columns are keys, `#` means that the query sees the key.

    The first sample is drawn; sequences over 96 tokens are described in a line instead.
    """
    batch, queries, keys = visibility.shape
    legend = ", ".join(f"{name[0].upper()} {name}" for name in visibility.names)
    head = f"Visibility[B={batch}, Sq={queries}, Sk={keys}] rows see columns; {legend}, . padding"
    if max(queries, keys) > _MAX_CELLS:
        return f"{head}\n(too long to draw; {float(visibility.dense()[0].float().mean()):.1%} of the pairs are visible)"
    mask = visibility.dense()[0].tolist()
    left = _letters(visibility, visibility.queries, 0)
    lines = [f"  {_letters(visibility, visibility.keys, 0)}"]
    lines += [f"{name} {''.join('#' if cell else '·' for cell in row)}" for name, row in zip(left, mask, strict=True)]
    return "\n".join([head, *lines])


def plot_mask(visibility: Visibility, path: str | PathLike[str], sample: int = 0) -> None:
    """Draw one sample's mask: a cell is coloured by the class of the key that the query sees."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    mask = visibility.dense()[sample].cpu().numpy()
    key_cls = visibility.keys.cls[sample].cpu().numpy()
    colours = np.array([colormaps["tab10"](i)[:3] for i in range(len(visibility.names))])
    picture = np.ones((*mask.shape, 3)) * 0.96
    picture[mask] = np.broadcast_to(colours[key_cls], (*mask.shape, 3))[mask]
    size = min(12.0, 2.5 + 0.12 * max(mask.shape))
    figure = Figure(figsize=(size + 1.6, size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(picture, interpolation="nearest")
    small = max(mask.shape) <= _MAX_CELLS
    for axis, tokens in ((axes.xaxis, visibility.keys), (axes.yaxis, visibility.queries)):
        letters = _letters(visibility, tokens, sample)
        axis.set_ticks(range(len(letters)) if small else [], labels=list(letters) if small else [], fontsize=6)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    handles = [Patch(color=tuple(colours[i]), label=name) for i, name in enumerate(visibility.names)]
    axes.legend(handles=handles, title="sees", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.savefig(path, dpi=130)
