"""Draw the family tree of a run, by the hashes of parents in each checkpoint's `herd.json`.

There are two drawings of the tree, from left to right for wide screens and downwards for narrow ones. The
page's style sheet shows one of them. A model's first child continues its parent's line (teacher → long →
instruct), and the other children branch off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from ..units import nbytes, si
from . import svg
from .palette import tone
from .run import Run, Stage
from .svg import tag, text

BOX_WIDTH, BOX_HEIGHT = 212.0, 112.0
GAP_X, GAP_Y, INDENT = 48.0, 20.0, 26.0

_HOW = {
    "teacher": "pre-trained",
    "long": "context extended",
    "instruct": "tuned on dialogs",
    "student": "pruned and distilled",
    "control": "from random weights",
}
# the parents of models whose checkpoints have no lineage, as `herd raise` makes them
_USUAL_PARENTS = {"long": "teacher", "instruct": "long", "student": "instruct", "control": None}


@dataclass
class Node:
    """A member of the family. ``lines`` are printed under its name."""

    name: str
    size: str
    lines: list[str]
    hash: str
    tone: str
    children: list[Node] = field(default_factory=list)
    lane: int = 0
    level: int = 0


def family(run: Run) -> Node | None:
    """Return the tree of a run's models under their tokenizer, or None if there is no model yet."""
    nodes = {stage.model_name: _node(stage) for stage in run.stages if stage.model_name}
    if not nodes:
        return None
    root = _root(run)
    for stage in run.stages:
        if stage.model_name:
            parent = _parent(stage, run.stages)
            (nodes[parent] if parent else root).children.append(nodes[stage.model_name])
    _place(root, 0, 0, {})
    return root


def wide(root: Node) -> str:
    """Draw the tree from left to right."""
    nodes = list(_walk(root))
    parts = []
    for node in nodes:
        x, y = node.level * (BOX_WIDTH + GAP_X), node.lane * (BOX_HEIGHT + GAP_Y)
        for child in node.children:
            start, end = (x + BOX_WIDTH, y + BOX_HEIGHT / 2), (x + BOX_WIDTH + GAP_X, 0.0)
            end = (end[0], child.lane * (BOX_HEIGHT + GAP_Y) + BOX_HEIGHT / 2)
            parts.append(_edge(_elbow(start, end), end, child))
    for node in nodes:
        parts.append(_box(node, node.level * (BOX_WIDTH + GAP_X), node.lane * (BOX_HEIGHT + GAP_Y)))
    width = (max(node.level for node in nodes) + 1) * (BOX_WIDTH + GAP_X) - GAP_X
    height = (max(node.lane for node in nodes) + 1) * (BOX_HEIGHT + GAP_Y) - GAP_Y
    return _framed(width, height, parts, root, "chart tree-wide")


def narrow(root: Node) -> str:
    """Draw the tree downwards.

    The main line continues after the indented branches, so that no edge crosses a box.
    """
    parts: list[str] = []
    row = 0

    def draw(node: Node, depth: int) -> tuple[float, float]:
        nonlocal row
        x, y = depth * INDENT, row * (BOX_HEIGHT + GAP_Y)
        row += 1
        parts.append(_box(node, x, y))
        trunk = x + INDENT / 2
        for child in [*node.children[1:], *node.children[:1]]:
            first = child is node.children[0]
            child_x, child_y = draw(child, depth if first else depth + 1)
            end = (trunk, child_y) if first else (child_x, child_y + BOX_HEIGHT / 2)
            line = f"M{trunk:.1f} {y + BOX_HEIGHT:.1f}V{end[1]:.1f}H{end[0]:.1f}"
            parts.insert(0, _edge(line, end, child, down=first))
        return x, y

    draw(root, 0)
    depth = max(node.lane for node in _walk(root))
    return _framed(
        BOX_WIDTH + depth * INDENT + 2, row * (BOX_HEIGHT + GAP_Y) - GAP_Y, parts, root, "chart tree-narrow"
    )


def _framed(width: float, height: float, parts: list[str], root: Node, class_: str) -> str:
    body = tag("g", "".join(parts), transform="translate(1 1)")
    return svg.drawing(width + 2, height + 2, body, "Family tree: " + _describe(root), class_)


def _describe(node: Node) -> str:
    children = " and ".join(_describe(child) for child in node.children)
    return f"{node.name} {node.size}".strip() + (f", parent of ({children})" if children else "")


def _parent(stage: Stage, stages: list[Stage]) -> str | None:
    """Return the parent of a stage's model by the hash of its weights. A model named as the role wins."""
    hashes = {
        other.model_name: other.lineage.get("weights_hash")
        for other in stages
        if other.model_name and other.model_name != stage.model_name
    }
    parents = stage.lineage.get("parents", {})
    for role, hashed in parents.items():
        if role in hashes and hashes[role] == hashed:
            return role
    for hashed in parents.values():
        if (found := next((name for name, own in hashes.items() if own and own == hashed), None)) is not None:
            return found
    if stage.lineage:  # the lineage says that it has no parent here
        return None
    usual = _USUAL_PARENTS.get(stage.model_name or "")
    return usual if usual in hashes else None


def _root(run: Run) -> Node:
    stage = next((stage for stage in run.stages if stage.name == "tokenizer"), None)
    record = stage.record if stage else {}
    size = record.get("vocab_size") or run.plan.get("vocab_size")
    lines = ["byte-level BPE", f"vocabulary of {size:,}" if isinstance(size, int) else ""]
    return Node("tokenizer", "", lines, str(record.get("sha256") or "")[:12], "none")


def _node(stage: Stage) -> Node:
    name = stage.model_name or stage.name
    config = stage.config
    layers, dim, context = (
        config.get(key) for key in ("num_hidden_layers", "hidden_size", "max_position_embeddings")
    )
    how = _HOW.get(tone(name), "trained")
    shape = [f"{layers} layers × {dim}"] if layers and dim else []
    shape += [f"context {context:,}"] if isinstance(context, int) else []
    lines = [how, f"{si(stage.tokens, digits=2)} tokens" if stage.tokens else "", " · ".join(shape)]
    params = si(stage.n_params, digits=2) if stage.n_params else ""
    hashed = str(stage.lineage.get("weights_hash") or "").removeprefix("sha256:")[:12]
    if stage.weight_bytes:
        hashed += ("  " if hashed else "") + nbytes(stage.weight_bytes)
    return Node(name, params, lines, hashed, tone(name))


def _place(node: Node, level: int, lane: int, used: dict[int, int]) -> None:
    """Set the level and lane of every node. A branch takes the first lane that is free at all its levels.

    ``used`` is the last lane taken at each level.
    """
    node.level, node.lane = level, lane
    used[level] = max(lane, used.get(level, 0))
    for index, child in enumerate(node.children):
        deep = range(level + 1, level + 1 + _depth(child))
        free = max(used.get(deeper, -1) for deeper in deep) + 1
        _place(child, level + 1, lane if index == 0 else max(free, lane + 1), used)


def _depth(node: Node) -> int:
    return 1 + max((_depth(child) for child in node.children), default=0)


def _walk(node: Node) -> list[Node]:
    return [node, *(inner for child in node.children for inner in _walk(child))]


def _elbow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (x2, y2) = start, end
    if y == y2:
        return f"M{x:.1f} {y:.1f}H{x2:.1f}"
    middle, turn = (x + x2) / 2, 8.0
    return (
        f"M{x:.1f} {y:.1f}H{middle - turn:.1f}Q{middle:.1f} {y:.1f} {middle:.1f} {y + turn:.1f}"
        f"V{y2 - turn:.1f}Q{middle:.1f} {y2:.1f} {middle + turn:.1f} {y2:.1f}H{x2:.1f}"
    )


def _edge(line: str, end: tuple[float, float], child: Node, down: bool = False) -> str:
    x, y = end
    head = f"M{x - 4:.1f} {y - 7:.1f}L{x:.1f} {y:.1f}L{x + 4:.1f} {y - 7:.1f}Z" if down else (
        f"M{x - 7:.1f} {y - 4:.1f}L{x:.1f} {y:.1f}L{x - 7:.1f} {y + 4:.1f}Z"
    )  # fmt: skip
    dashed = " dash" if child.tone == "control" else ""
    return tag("path", d=line, class_="edge" + dashed) + tag("path", d=head, class_="tip")


def _box(node: Node, x: float, y: float) -> str:
    colour = f"var(--{node.tone})"
    dashed = "5 4" if node.tone == "control" else None
    parts = [
        tag("rect", x=x, y=y, width=BOX_WIDTH, height=BOX_HEIGHT, rx=8, class_="node",
            style=f"stroke: {colour}", stroke_dasharray=dashed),
        tag("circle", cx=x + 18, cy=y + 20, r=5, style=f"fill: {colour}"),
        tag("text", escape(node.name), x=x + 30, y=y + 25, class_="big"),
        text(x + BOX_WIDTH - 14, y + 25, node.size, "end", "num strong"),
    ]  # fmt: skip
    for index, line in enumerate(node.lines):
        parts.append(text(x + 14, y + 45 + 18 * index, line, class_="num"))
    if node.hash:
        parts.append(text(x + 14, y + 45 + 18 * 3, node.hash, class_="mono faint", style="white-space: pre"))
    return tag("g", "".join(parts))
