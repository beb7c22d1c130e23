"""Computes the directions of every site once on rank 0, keeps them in one file, and broadcasts them when needed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from srlora_dist.config.method import SRLoRAConfig
from srlora_dist.config.paths import cache_dir, require_writable
from srlora_dist.layers.site import Site
from srlora_dist.method.direction_file import PARTS, DirectionFile
from srlora_dist.method.svd import Triplet, compute_directions
from srlora_dist.storage.base import Storage

METHOD = "krylov-1"

logger = logging.getLogger(__name__)


class OriginalWeights:
    """Reads pretrained weights from the safetensors files of a local checkpoint folder.

    Args:
        folder: Folder of the checkpoint, as ``from_pretrained`` reads it.

    Raises:
        ValueError: The folder has no safetensors files, one cannot be read, or several hold the same weight.
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


class Directions:
    """Gives every rank the directions it is about to use; rank 0 reads them from the file or computes them.

    1. All ranks digest the weights they hold; one all-reduce gives the fingerprint, which names the file.
    2. Rank 0 looks for a whole file of that fingerprint; one small broadcast tells the others.
    3. If there is none, for each site: W is gathered on rank 0 alone while it factors the one before, and a few bytes
       tell the others that it worked, so that no rank waits longer than one site takes. With ``svd_distribute`` as
       many sites at a time as there are ranks, each on a rank of its own; at the end rank 0 collects the triplets.

    Args:
        storage: How the ranks hold the weights.
        config: ``svd_cache``, ``svd_distribute`` and ``directions_from``; with that W is read instead of gathered.
    """

    def __init__(self, storage: Storage, config: SRLoRAConfig) -> None:
        self.storage = storage
        self.cache, self.checkpoint = config.svd_cache, config.directions_from
        self.shares = config.svd_distribute and storage.world_size > 1
        if self.shares and self.checkpoint is not None:
            logger.warning("srlora.svd_distribute is without effect with directions_from, which rank 0 reads")
            self.shares = False
        self.digests: list[int] = []  # one for each site's W
        self.path: Path | None = None  # set on rank 0
        self._file: DirectionFile | None = None  # set on rank 0
        self._original: OriginalWeights | None = None  # set on rank 0, with directions_from
        self.was_there = False  # whether the file existed before prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the file if there is none.

        Collective: the three phases above, on every rank.

        Raises:
            ValueError: A site could not be factored or read, or the folder cannot be written.
        """
        fingerprint = self._fingerprint()
        found = self.storage.on_rank_0("look for a file of directions", lambda: self._find(fingerprint))
        self.was_there = self.storage.rank_0_says(bool(found))
        if self.was_there:
            return
        tensors = self._compute()
        self.storage.on_rank_0("write the directions (srlora.svd_cache)", lambda: self._file.write(tensors, METHOD))

    def take(self, wanted: list[tuple[int, list[int]]], made: dict[int, Triplet]) -> list[Triplet]:
        """The wanted directions of each (site number, their numbers): U (m, k), S (k,), Vt (k, n).

        Args:
            wanted: Sites and directions, the same on every rank.
            made: On rank 0, by site number, directions to broadcast in place of those in the file.

        Collective: one broadcast of all of them together from rank 0.

        Raises:
            ValueError: Rank 0 cannot read the file any more.
        """
        sites = self.storage.sites
        shapes = [(sites[i].shape[0], len(numbers), sites[i].shape[1]) for i, numbers in wanted]
        sizes = [size for m, k, n in shapes for size in (m * k, k, k * n)]
        packed = torch.zeros(sum(sizes) + 1, device=self.storage.device)  # the last element says that they were read
        *parts, were_read = packed.split([*sizes, 1])
        if self.storage.rank == 0:
            were_read.fill_(self._read(wanted, made, parts))
        if not self.storage.broadcast_(packed)[-1].item():
            raise ValueError(
                "rank 0 cannot read its copy of the directions any more: look at the disk, and start the run again"
            )
        triplets = zip(parts[0::3], parts[1::3], parts[2::3], shapes, strict=True)
        return [(left.view(k, m).T, values, right.view(k, n)) for left, values, right, (m, k, n) in triplets]

    def singular_values(self) -> dict[str, list[float]]:
        """The singular values of each site by its name, falling; for rank 0 alone."""
        return {site.name: self._file.singular_values(site.name) for site in self.storage.sites}

    def _read(self, wanted: list[tuple[int, list[int]]], made: dict[int, Triplet], parts: list[Tensor]) -> bool:
        """Fill the parts; False where the file cannot be read. It must not raise, because the other ranks wait."""
        try:
            for j, (number, rows) in enumerate(wanted):
                if number in made:
                    left, values, right = made[number]
                    of_site = [left.T, values, right]
                else:
                    of_site = self._file.rows(self.storage.sites[number].name, rows)
                for part, tensor in zip(parts[3 * j : 3 * j + 3], of_site, strict=True):
                    part.copy_(tensor.flatten())
        except OSError:
            return False
        return True

    def _fingerprint(self) -> list:
        """What the directions depend on: method, and each site's name, shape, count and digest of W."""
        storage = self.storage
        self.digests = storage.digest_weights()
        entries = zip(storage.sites, self.digests, strict=True)
        return [METHOD, *([site.name, *site.shape, site.state.target_rank, digest] for site, digest in entries)]

    def _find(self, fingerprint: list) -> bool:
        """Whether the file is there and its content matches its own digest; a damaged one is reported."""
        if self.checkpoint is not None:
            self._original = OriginalWeights(self.checkpoint)
            fingerprint = [*fingerprint, self._original.identity()]
        name = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()[:32]
        folder = Path(self.cache) if self.cache is not None else cache_dir() / "svd"
        self._file = DirectionFile(folder / f"{name}.safetensors")
        self.path = self._file.path
        if not self.path.exists():
            require_writable(folder, "srlora.svd_cache")
            return False
        with contextlib.suppress(OSError):
            if self._file.open():
                return True
        warnings.warn(f"the file of directions {self.path} is damaged and will be computed again", stacklevel=2)
        return False

    def _compute(self) -> dict[str, Tensor]:
        """The triplets of all sites, on rank 0 and on the CPU; an empty dict elsewhere. Collective: see the class."""
        storage, sites = self.storage, self.storage.sites
        made: dict[int, Triplet] = {}
        bar = tqdm(total=len(sites), desc="directions (SVD)", unit="matrix", disable=storage.rank != 0, leave=False)
        with bar, ThreadPoolExecutor(1) as pool:
            before: list[int] = []
            running: Future | None = None
            for numbers in [*self._rounds(), []]:
                stored = self._gather(numbers)
                if before:
                    made |= storage.run_on_ranks("factor a site", running and running.result) or {}
                    bar.update(len(before))
                mine = numbers[storage.rank : storage.rank + 1]
                before, running = numbers, pool.submit(self._factor, mine[0], stored) if mine else None
        return self._collect(made)

    def _rounds(self) -> list[list[int]]:
        """Indices of the sites that are factored at the same time, the first on rank 0 and so on."""
        sites = self.storage.sites
        if not self.shares:
            return [[number] for number in range(len(sites))]
        # Sites of similar size together, so that no rank waits for long.
        order = sorted(range(len(sites)), key=lambda number: math.prod(sites[number].shape), reverse=True)
        width = self.storage.world_size
        return [order[k : k + width] for k in range(0, len(sites), width)]

    def _gather(self, numbers: list[int]) -> Tensor | None:
        """The W, as stored, of the site that this rank factors. Collective: each W goes to the rank that factors it."""
        mine = None
        for to_rank, number in enumerate(numbers if self.checkpoint is None else []):
            with self.storage.in_memory(number):
                stored = self.storage.gather_stored(number, to_rank)
            mine = stored if stored is not None else mine
        return mine

    @torch.no_grad()  # the setting belongs to a thread, and this runs in another one
    def _factor(self, number: int, stored: Tensor | None) -> dict[int, Triplet]:
        """A site's directions as the file keeps them: on the CPU, with U transposed so that each direction is a row."""
        storage, site = self.storage, self.storage.sites[number]
        try:
            given = stored is not None
            weight = storage.widen(number, stored) if given else self._original.read(site).to(storage.device)
            left, values, right = compute_directions(weight, site.state.target_rank)
        except (ArithmeticError, RuntimeError) as error:
            raise ValueError(f"cannot factor {site.name}: {error}") from error
        return {number: (left.T.contiguous().cpu(), values.cpu(), right.cpu())}

    def _collect(self, made: dict[int, Triplet]) -> dict[str, Tensor]:
        """All directions by name, as in the file, on rank 0. Collective: a gather, if the ranks shared the work."""
        sites = self.storage.sites
        names = [f"{site.name}.{part}" for site in sites for part in PARTS]
        if not self.shares:
            made = [part for number in sorted(made) for part in made[number]]
            return dict(zip(names, made, strict=True)) if self.storage.rank == 0 else {}
        ranks = [(site.state.target_rank, *site.shape) for site in sites]
        shapes = [shape for k, m, n in ranks for shape in ((k, m), (k,), (k, n))]
        mine = ((3 * number + j, part) for number, triplet in made.items() for j, part in enumerate(triplet))
        parts = [(number, 0, part.flatten()) for number, part in mine]
        wholes = self.storage.gather_to_0([math.prod(shape) for shape in shapes], parts)
        if self.storage.rank != 0:
            return {}
        return {name: whole.view(shape) for name, whole, shape in zip(names, wholes, shapes, strict=True)}
