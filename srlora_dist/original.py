"""Reads weights of the original checkpoint of a model that was quantised when it was loaded."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from srlora_dist.layers.site import Site


class OriginalWeights:
    """The safetensors files of a local checkpoint folder.

    Args:
        folder: Of the checkpoint, as ``from_pretrained`` reads it.

    Raises:
        ValueError: There are no safetensors files in it, one cannot be read, or several hold the same weight.
    """

    def __init__(self, folder: str | Path) -> None:
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"srlora.directions_from {folder} has no safetensors files: give the checkpoint's folder")
        self._places: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, "pt") as file:
                    twice = self._places.keys() & set(file.keys())
                    self._places.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"srlora.directions_from has {path}, which cannot be read ({error})") from error
            if twice:
                raise ValueError(f"srlora.directions_from {folder} has {min(twice)} in several files: give one variant")

    def identity(self) -> list:
        """Name, size and time of each file, by which the files of directions made from them are told apart."""
        stats = [(path, path.stat()) for path in self.files]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def read(self, site: Site) -> Tensor:
        """W of a site, (m, n) in float32.

        Raises:
            ValueError: The checkpoint has no such weight, several, or one of another shape.
        """
        name = f"{site.name}.weight"
        # A task's model holds the checkpoint's under a prefix, or the other way round.
        keys = [key for key in self._places if key.endswith(f".{name}") or name.endswith(f".{key}")]
        keys = [name] if name in self._places else keys
        if len(keys) != 1:
            found = f"several for {name}: {', '.join(keys)}" if keys else f"no weight {name}"
            raise ValueError(f"srlora.directions_from has {found}; give the checkpoint of this model")
        (key,) = keys
        with safe_open(self._places[key], "pt") as file:
            weight = file.get_tensor(key).float()
        weight = weight.T if site.transposed else weight
        if weight.shape != site.shape:
            raise ValueError(f"srlora.directions_from has {key} as {tuple(weight.shape)}, but the model {site.shape}")
        return weight
