"""What an inspection finds: the reports of all layers, and ways to show them."""

import json
from dataclasses import dataclass, fields
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicit_attention.errors import bad_value, check_choice
from implicit_attention.inspection.records import SETTLED, LayerReport, Trouble

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("residual", "attention", "gain", "steps")


@dataclass(frozen=True, eq=False)
class Report:
    """What `inspect` found.

    Attributes:
        layers: One entry for each layer, in the order of the calls.
        tokens: Labels of the tokens.
    """

    layers: tuple[LayerReport, ...]
    tokens: tuple[str, ...]

    @property
    def settles(self) -> bool:
        """Whether every token of every layer is within tolerance."""
        return all(layer.settles for layer in self.layers)

    @property
    def summary(self) -> str:
        """The summary in words, a line for each layer."""
        return "\n".join(layer.summary() for layer in self.layers)

    def __repr__(self) -> str:
        """Return the summary."""
        return f"Report({len(self.layers)} layers, {len(self.tokens)} tokens)\n{self.summary}"

    def to_json(self, *, maps: bool = False) -> str:
        """Return the report as JSON; NaN and infinity are null.

        Args:
            maps: Also the attention maps, which are large.
        """
        layers = [
            {
                f.name: _plain(getattr(layer, f.name))
                for f in fields(layer)
                if maps or not f.name.endswith(("maps", "map"))
            }
            for layer in self.layers
        ]
        return json.dumps({"tokens": self.tokens, "summary": self.summary, "layers": layers}, allow_nan=False)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with a row for each layer, head and token.

        Raises:
            ImportError: If pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.concat([pandas.DataFrame(self._columns(layer)) for layer in self.layers], ignore_index=True)

    def _columns(self, layer: LayerReport) -> dict[str, Any]:
        heads, count = layer.rate.shape
        by_token = ("steps", "residual", "converged", "period", "gain", "fold", "other_start")
        index = {"layer": layer.name, "head": [head for head in range(heads) for _ in range(count)],
                 "position": list(range(count)) * heads, "token": list(self.tokens) * heads}  # fmt: skip
        return {
            **index,
            **{name: getattr(layer, name).repeat(heads).numpy() for name in by_token},
            **{name: getattr(layer, name).flatten().numpy() for name in ("plain_steps", "rate")},
        }

    def _repr_html_(self) -> str:
        """Return the summary as a table, for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in ("layer", "settles", "steps", "gain", "radius", "what to know"))
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(layer))}</tr>" for layer in self.layers
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def to_html(self, title: str = "implicit-attention") -> str:
        """Return a page to look at in a browser, in one piece: it loads nothing.

        Args:
            title: Of the page.

        Raises:
            ImportError: If bokeh is missing.
        """
        from implicit_attention.inspection.page import page

        return page(self.layers, self.tokens, title)

    def figure(
        self,
        kind: str = "residual",
        *,
        layer: int = 0,
        head: int | None = None,
        iteration: int | str = SETTLED,
        ax: "Axes | None" = None,
    ) -> "Figure":
        """Draw one aspect of a layer with matplotlib.

        Args:
            kind: "residual" (plain iteration, by token and step), "attention", "gain" (by token) or "steps".
            layer: Which layer.
            head: Which head; the mean of "attention", the largest of "residual" over all if None.
            iteration: Of "attention": one of the layer's `iterations`, or "settled".
            ax: Where to draw; axes of a new figure if None.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such kind, layer, head or iteration.
        """
        from implicit_attention.inspection import plots

        check_choice("kind", kind, KINDS)
        if not 0 <= layer < len(self.layers):
            raise bad_value("layer", f"from 0 to {len(self.layers) - 1}", layer)
        found = self.layers[layer]
        heads = len(found.settled_map)
        if head is not None and not 0 <= head < heads:
            raise bad_value("head", f"None, or from 0 to {heads - 1}", head)
        if kind == "attention":
            weights = found.at(iteration)
            return plots.heat(weights.mean(0) if head is None else weights[head], "token that is seen",
                              "token that sees", f"{found.name}, {iteration}", ax=ax)  # fmt: skip
        if kind == "residual":
            trace = found.trace.amax(1) if head is None else found.trace[:, head]
            return plots.heat(trace.clamp_min(1e-16).log10(), "token", "step of plain iteration",
                              f"{found.name}, log10 of the residual", ax=ax)  # fmt: skip
        return plots.by_token(found.gain if kind == "gain" else found.steps, kind, found.name, ax=ax)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    words = " ".join(f"{t.sentence} {t.advice}" for t in layer.troubles)
    figures = f"{float(layer.gain.max()):.3g}", f"{layer.radius:.3g}"
    return layer.name, "yes" if layer.settles else "no", str(int(layer.steps.max())), *figures, words


def _plain(value: Any) -> Any:
    """A value as JSON knows it."""
    if isinstance(value, Tensor):
        return _plain(torch.view_as_real(value).tolist() if value.is_complex() else value.tolist())
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Trouble):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
