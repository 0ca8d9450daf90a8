"""Which layers a server leaves unquantized, by the names and patterns of `exclude_modules`.

The rules are vLLM's (`ModelOptQuantConfigBase.is_layer_excluded`, `apply_vllm_mapper`, `is_layer_skipped`), as
`qat.export.config.excluding_pattern` has them for one name; here for all layers of a checkpoint against lists that may
be long: a checkpoint that names every unquantized expert lists 18,000.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from typing import NamedTuple

from qat.quant.names import FUSED_WHEN_SERVED, sharing_groups

#: More than any model has modules, and more patterns with an inner `*` than any exporter writes.
MAX_NAMES = 50_000
MAX_GLOBS = 200

_FUSED_NAMES = dict(zip(FUSED_WHEN_SERVED, ("qkv_proj", "gate_up_proj"), strict=True))


class Served(NamedTuple):
    """A layer as vLLM builds it.

    Attributes:
        name: The name that the server asks about, in the checkpoint's terms: `….qkv_proj`, `….experts`, or the module.
        members: The checkpoint's modules in it.
    """

    name: str
    members: tuple[str, ...]


def served_layers(modules: Iterable[str]) -> list[Served]:
    """Gather modules into the layers that vLLM builds: q, k, v; gate, up; all routed experts of a layer; the rest."""
    alone: dict[str, None] = {}
    experts: dict[str, list[str]] = {}
    for name in modules:
        parent, found, _ = name.partition(".experts.")
        if found:
            experts.setdefault(f"{parent}.experts", []).append(name)
        else:
            alone[name] = None
    layers = [Served(name, tuple(members)) for name, members in experts.items()]
    for group in sharing_groups(alone):
        parent, _, leaf = group[0].rpartition(".")
        fused = next(name for leaves, name in _FUSED_NAMES.items() if leaf in leaves)
        layers.append(Served(f"{parent}.{fused}", tuple(group)))
        for member in group:
            del alone[member]
    return [*layers, *(Served(name, (name,)) for name in alone)]


class Exclusions:
    """A list of excluded names, ready to be asked about many layers.

    A name matches as a part of a layer's name; `name*` counts as `name` and `name.*`; other `*` match as in file names.

    Args:
        patterns: The list.

    Attributes:
        is_usable: False where the list is longer than any real one: it is not asked then.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._stems = {
            pattern[:-1] if pattern.endswith("*") and not pattern.endswith(".*") else pattern for pattern in patterns
        }
        globs = [stem for stem in self._stems if set(stem) & set("*?[")]
        self.is_usable = len(self._stems) <= MAX_NAMES and len(globs) <= MAX_GLOBS
        self._globs = [re.compile(fnmatch.translate(glob)) for glob in globs[:MAX_GLOBS]]
        self._lengths = sorted({len(stem) for stem in self._stems})
        self._experts = "\n".join(stem for stem in self._stems if "experts" in stem)

    def exclude(self, layer: Served) -> bool | None:
        """Tell whether the layer stays unquantized.

        Returns:
            None where vLLM refuses the model: the list names some members of a fused layer and not the others.
        """
        if "experts" in layer.name:
            if layer.name in self._experts:
                return True
        elif len(layer.members) > 1 and layer.name not in self._stems:
            listed = [member in self._stems for member in layer.members]
            if any(listed):
                return True if all(listed) else None
        return self.match(layer.name)

    def match(self, name: str) -> bool:
        """Tell whether any entry matches this one name."""
        if len(self._stems) <= len(name) * len(self._lengths):
            inside = any(stem in name for stem in self._stems)
        else:
            parts = (name[start : start + size] for size in self._lengths for start in range(len(name) - size + 1))
            inside = any(part in self._stems for part in parts)
        return inside or any(glob.match(name) for glob in self._globs)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """List the entries, without a closing `*`, that match none of these names."""
        known = set(names)
        text = "\n".join(known)
        return sorted(
            stem
            for stem in self._stems
            if stem not in known
            and stem not in text
            and not (set(stem) & set("*?[") and any(map(re.compile(fnmatch.translate(stem)).match, known)))
        )
