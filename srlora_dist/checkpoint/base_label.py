"""Which base an adapter belongs to, as the file of its tensors says: the type of W, and a digest of it at each site.

The digest of a quantised W is that of its scales, the largest numbers of its blocks: those are the same wherever the
model was quantised, while a processor may round one of many millions of payload bits in another way than a GPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from srlora_dist.layers.digest import digest_span
from srlora_dist.layers.site import Site, describe_base, quantisation
from srlora_dist.storage.quantized import digest_layer_scales, digest_scales

KEY = "srlora_base"
"""In the metadata of ``adapter_model.safetensors``."""


@dataclass(frozen=True)
class BaseLabel:
    """The base that an adapter was trained on.

    Args:
        weights: The type of the adapted weights, as ``describe_base`` says it.
        digests: Of the untouched W of each site, by its name; sites that the adapter brings W of are left out.
        vocab_size: Rows of the embeddings, where they were resized.
    """

    weights: str
    digests: dict[str, str] = field(default_factory=dict)
    vocab_size: int | None = None

    @classmethod
    def of(
        cls, sites: list[Site], digests: list[int], leave_out: list[str] = (), vocab_size: int | None = None
    ) -> BaseLabel:
        """The label of what is trained; ``digests`` are of each site's untouched W."""
        named = {
            site.name: f"{digest_scales(site) if site.quantised else digest:016x}"
            for site, digest in zip(sites, digests, strict=True)
            if site.name not in leave_out
        }
        return cls(describe_base(sites), named, vocab_size)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> BaseLabel:
        """What ``as_dict`` gave.

        Raises:
            ValueError, KeyError, TypeError: It is something else.
        """
        size = values.get("vocab_size")
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(f"vocab_size is {size!r}")
        return cls(str(values["weights"]), dict(values["digests"]), size)

    @classmethod
    def read(cls, path: object) -> BaseLabel | None:
        """The label of a file of an adapter; None where it has none, as one that something else has written.

        Raises:
            ValueError: There is one, and it cannot be read.
        """
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
        try:
            return None if text is None else cls.from_dict(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the metadata {KEY} of {path} cannot be read ({error!r})") from error

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def metadata(self) -> dict[str, str]:
        """For a file of safetensors."""
        return {KEY: json.dumps(self.as_dict())}

    def differing(self, model: nn.Module) -> list[str]:
        """The sites at which another base has other weights.

        Quantised ones count where more than half of them differ: one scale of a double quantisation may be rounded in
        another way on another device.

        Args:
            model: The base, with an adapter or without, in the type that the adapter belongs to.
        """
        found: dict[bool, list[str]] = {True: [], False: []}
        num_quantised = 0
        layers = dict(model.named_modules())
        for name, digest in self.digests.items():
            if name not in layers:
                found[False].append(name)
                continue
            layer = layers[name].get_base_layer() if isinstance(layers[name], LoraLayer) else layers[name]
            kind = quantisation(layer)
            num_quantised += bool(kind)
            now = digest_layer_scales(layer, kind) if kind else digest_span(layer.weight)
            if f"{now:016x}" != digest:
                found[bool(kind)].append(name)
        return found[False] + (found[True] if len(found[True]) * 2 > num_quantised else [])
