"""Labels an adapter with the base that it belongs to: the type of the weights, and a digest of W at each site.

For a quantised W the digest is that of its scales, which are the largest values of its blocks. They are the same
wherever the model was quantised, while a CPU and a GPU may round a few bits of the payload differently.
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
"""Key of the label in the metadata of ``adapter_model.safetensors``."""


@dataclass(frozen=True)
class BaseLabel:
    """The base that an adapter was trained on.

    Args:
        weights: The type of the adapted weights, in the words of ``describe_base``.
        digests: Digest of each site's untouched W, by the site's name. Sites whose W the adapter holds are left out.
        vocab_size: Rows of the embeddings, if they were resized.
    """

    weights: str
    digests: dict[str, str] = field(default_factory=dict)
    vocab_size: int | None = None

    @classmethod
    def of(
        cls, sites: list[Site], digests: list[int], leave_out: list[str] = (), vocab_size: int | None = None
    ) -> BaseLabel:
        """The label of a model.

        Args:
            sites: The sites of the model.
            digests: Digest of each site's untouched W.
            leave_out: Names of the sites whose W the adapter holds.
            vocab_size: Rows of the embeddings, if they were resized.
        """
        named = {
            site.name: f"{digest_scales(site) if site.quantised else digest:016x}"
            for site, digest in zip(sites, digests, strict=True)
            if site.name not in leave_out
        }
        return cls(describe_base(sites), named, vocab_size)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> BaseLabel:
        """The label from what ``as_dict`` returned.

        Raises:
            ValueError, KeyError, TypeError: The values are not those of a label.
        """
        size = values.get("vocab_size")
        if size is not None and not (isinstance(size, int) and size > 0):
            raise ValueError(f"vocab_size is {size!r}")
        return cls(str(values["weights"]), dict(values["digests"]), size)

    @classmethod
    def read(cls, path: object) -> BaseLabel | None:
        """The label in an adapter's file of tensors; None if it has none, because another program wrote it.

        Raises:
            ValueError: There is a label, but it cannot be read.
        """
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
        try:
            return None if text is None else cls.from_dict(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the metadata {KEY} of {path} cannot be read ({error!r})") from error

    def as_dict(self) -> dict[str, object]:
        """The label as JSON can hold it."""
        return asdict(self)

    def metadata(self) -> dict[str, str]:
        """The label as metadata of a safetensors file."""
        return {KEY: json.dumps(self.as_dict())}

    def differing(self, model: nn.Module) -> list[str]:
        """Names of the sites at which a model's weights differ from those of this base.

        Quantised sites count only if more than half of them differ, because another device may round a scale of a
        double quantisation differently.

        Args:
            model: The model, with an adapter or without, in the type that the adapter belongs to.
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
