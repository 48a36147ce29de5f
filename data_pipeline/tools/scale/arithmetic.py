"""Hours, bytes and money of the data stages, counted from rates: what `raphael plan` shows.

    seconds of a part = sum(items / rate) / lanes          a lane: a core, a process, a GPU, a machine's network
    seconds of a stage = sum over its phases of the longest part         the parts of a phase run at the same time

The longest part of the longest phase is what to relieve first. Rates of a core are taken to hold for all of a
machine's; that is arithmetic, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.tools.scale.rates import Rate, Rates

PUBLISHED, ASKED = "published", "asked"
LIST_ROW_BYTES, SPILLED_ROW_BYTES = 100, 250  # docs/data.md: LAION's parquet; an upper bound of what `select` spills
TOKENS = 77


@dataclass(frozen=True)
class Asked:
    """What is planned for. Shares are of the stage before; sizes_px: [height, width] that images are encoded at."""

    rows: float
    machines: int = 1
    workspaces: int = 1  # parts of the list, each a workspace with stages of its own
    cores: int = 16  # of a machine
    gpus: int = 0  # of a machine
    memory_gb: float = 64.0
    network_gbit: float = 10.0
    links_per_s: float = 1350.0  # a machine; img2dataset's authors, on 16 cores with a good resolver
    alive: float = 0.55  # of the links: 67 % in October 2024, less 1 % a month
    image_kb: float = 88.0  # 78 TB of 1.33 G links at 67 %
    selected: float = 1.0
    filtered: float = 1.0
    size_px: tuple[int, int] = (256, 256)
    score: bool = False
    near_duplicates: bool = False
    machine_usd: float = 0.60  # an hour
    gpu_usd: float = 2.00  # an hour
    storage_usd: float = 0.023  # a GB and month
    months: float = 1.0

    @property
    def links(self) -> float:
        return self.rows * self.selected

    @property
    def images(self) -> float:
        return self.links * self.alive

    @property
    def kept(self) -> float:
        return self.images * self.filtered

    @property
    def record_bytes(self) -> float:
        """Of the fields moments (4 channels, an eighth of the side, mean and log-variance in float16), token ids
        (int32) and edges (a byte a place of the latent, at most)."""
        places = self.size_px[0] * self.size_px[1] / 64
        return places * (2 * 4 * 2 + 1) + 4 * TOKENS


@dataclass(frozen=True)
class Lanes:
    """Who works at the same time. machines: that are paid for meanwhile; relief: how there come to be more."""

    count: float
    name: str
    machines: int
    relief: str


@dataclass(frozen=True)
class Part:
    """terms: (items, what they are, what a lane does of them in a second), one after the other."""

    name: str
    terms: tuple[tuple[float, str, Rate], ...]
    lanes: Lanes

    @property
    def unknown(self) -> list[str]:
        return [rate.name for _, _, rate in self.terms if rate.value is None]

    @property
    def seconds(self) -> float:
        """Of the terms that are known."""
        known = sum(items / rate.value for items, _, rate in self.terms if rate.value is not None)
        return known / self.lanes.count

    @property
    def formula(self) -> str:
        told = " + ".join(f"{items:.4g} {what} / {_said(rate)}" for items, what, rate in self.terms)
        whole = f"({told})" if len(self.terms) > 1 else told
        return f"{whole} / {self.lanes.count:,g} {self.lanes.name}"


@dataclass(frozen=True)
class Planned:
    """A stage. gpus: that are paid for; written: bytes by what they are."""

    name: str
    phases: tuple[tuple[Part, ...], ...]
    gpus: int = 0
    written: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(max(part.seconds for part in phase) for phase in self.phases)

    @property
    def machines(self) -> int:
        return max(part.lanes.machines for phase in self.phases for part in phase)

    @property
    def unknown(self) -> list[str]:
        return [name for phase in self.phases for part in phase for name in part.unknown]

    @property
    def bottleneck(self) -> Part:
        longest = max(self.phases, key=lambda phase: max(part.seconds for part in phase))
        return max(longest, key=lambda part: part.seconds)

    def usd(self, asked: Asked) -> float:
        """A machine is paid for while a phase uses it; what stands idle between stages is not in it."""
        spent = 0.0
        for phase in self.phases:
            hours = max(part.seconds for part in phase) / 3600
            machines = max(part.lanes.machines for part in phase)
            uses_gpu = any("GPU" in part.lanes.name for part in phase)
            spent += hours * (machines * asked.machine_usd + uses_gpu * self.gpus * asked.gpu_usd)
        return spent


def plan(asked: Asked, rates: Rates) -> list[Planned]:
    """The stages of a list of links, in their order, and DVC's pass over what they leave."""
    make = _Maker(asked, rates)
    stages = [make.source(), make.select(), make.download()]
    stages += [make.score()] if asked.score else []
    return [*stages, make.filter(), make.captions(), make.encode(), make.dvc()]


def too_large(asked: Asked, rates: Rates) -> list[str]:
    """What does not fit, one sentence each."""
    each, said = rates["filter.memory"], []
    if each.value is not None:
        need_gb = asked.images / asked.workspaces * each.value / 1e9
        if need_gb > asked.memory_gb:
            said.append(
                f"filter: {need_gb:,.0f} GB of hashes ({asked.images / asked.workspaces:.3g} images x "
                f"{each.value:.3g} bytes), a machine has {asked.memory_gb:g}: at least "
                f"{_ceil(asked.images * each.value / 1e9 / asked.memory_gb)} workspaces"
            )
    return said


def _ceil(value: float) -> int:
    return int(-(-value // 1))


def _said(rate: Rate) -> str:
    return f"({rate.name}: not measured)" if rate.value is None else f"{rate.value:.4g} {rate.unit}"


class _Maker:
    def __init__(self, asked: Asked, rates: Rates):
        self.asked, self.rates = asked, rates
        here = min(asked.machines, asked.workspaces)
        relief = "more --workspaces, each a part of the list"
        self.alone = Lanes(asked.workspaces, "processes, one a workspace", here, relief)
        every = asked.cores * asked.machines
        self.spread = Lanes(every, f"cores of {asked.machines} machines", asked.machines, "more machines")
        self.here = Lanes(asked.cores * here, f"cores of {here} machines", here, f"{relief} on a machine of its own")
        self.lines = Lanes(here, "machines' networks", here, f"{relief} on a machine of its own")

    def source(self) -> Planned:
        rows = self.asked.rows
        part = self._alone("the stage's own process", (rows, "rows", "source.rows"))
        return Planned("source", ((part,),), written={"list": rows * LIST_ROW_BYTES})

    def select(self) -> Planned:
        part = self._alone("the stage's own process", (self.asked.rows, "rows", "select.rows"))
        spilled = {"spilled by select (goes with it)": self.asked.rows * SPILLED_ROW_BYTES}
        return Planned("select", ((part,),), written={"links": self.asked.links * LIST_ROW_BYTES, **spilled})

    def download(self) -> Planned:
        asked = self.asked
        web = Rate("links_per_s", asked.links_per_s, "links/s", "img2dataset's authors, 16 cores", PUBLISHED)
        line = Rate("network_gbit", asked.network_gbit * 1e9 / 8, "bytes/s", "of a machine", ASKED)
        bytes_ = asked.images * asked.image_kb * 1e3
        parts = (
            self._alone(
                "gateway and packing, one process",
                (asked.links, "links", "download.gateway"),
                (asked.images, "images", "download.pack"),
            ),
            self._part("decoding and resizing", self.here, (asked.images, "images", "download.worker")),
            Part("resolver and the web", ((asked.links, "links", web),), self.lines),
            Part("the line (images as stored; originals are larger)", ((bytes_, "bytes", line),), self.lines),
        )
        return Planned("download", (parts,), written={"shards": bytes_})

    def score(self) -> Planned:
        images = self.asked.images
        if self.asked.gpus:
            part = self._part("CLIP ViT-L/14", self._gpu_lanes(), (images, "images", "score.gpu"))
        else:
            part = self._part("CLIP ViT-L/14 without a GPU", self.spread, (images, "images", "score.cpu"))
        return Planned("score", ((part,),), gpus=self._gpus(), written={"scores": images * 16})

    def filter(self) -> Planned:
        asked = self.asked
        phases = [(self._alone("the rules, the stage's own process", (asked.links, "rows", "filter.rows")),)]
        if asked.near_duplicates:
            hashing = self._part("perceptual hashes", self.spread, (asked.images, "images", "filter.hash"))
            search = self._alone("search for near duplicates", (asked.images, "hashes", "filter.near"))
            phases += [(hashing,), (search,)]
        return Planned("filter", tuple(phases), written={"table of kept images": asked.kept * SPILLED_ROW_BYTES})

    def captions(self) -> Planned:
        clean = self._part("cleaning", self.spread, (self.asked.kept, "captions", "captions.rows"))
        join = self._alone("joining the table", (self.asked.kept, "captions", "captions.join"))
        return Planned("captions", ((clean,), (join,)), written={"captions": self.asked.kept * LIST_ROW_BYTES})

    def encode(self) -> Planned:
        asked = self.asked
        read = (asked.kept, "images", "encode.picture")
        encoded = (asked.kept * asked.size_px[0] * asked.size_px[1] / 1e6, "Mpx")
        if asked.gpus:
            cores = self._part("reading, cropping, edges", self.spread, read)
            phase = (cores, self._part("autoencoder", self._gpu_lanes(), (*encoded, "encode.gpu")))
        else:
            what = "reading, cropping, edges, autoencoder"
            phase = (self._part(what, self.spread, read, (*encoded, "encode.cpu")),)
        records = asked.kept * asked.record_bytes
        join = self._alone("joining the records", (records, "bytes", "encode.join"))
        return Planned("encode", (phase, (join,)), gpus=self._gpus(), written={"records": records})

    def dvc(self) -> Planned:
        bytes_ = self.asked.images * self.asked.image_kb * 1e3 + self.asked.kept * self.asked.record_bytes
        return Planned("dvc", ((self._alone("md5 of shards and records", (bytes_, "bytes", "dvc.md5")),),))

    def _gpus(self) -> int:
        return self.asked.gpus * self.asked.machines

    def _gpu_lanes(self) -> Lanes:
        machines = self.asked.machines
        return Lanes(self._gpus(), f"GPUs of {machines} machines", machines, "more GPUs")

    def _alone(self, name: str, *terms: tuple[float, str, str]) -> Part:
        return self._part(name, self.alone, *terms)

    def _part(self, name: str, lanes: Lanes, *terms: tuple[float, str, str]) -> Part:
        return Part(name, tuple((items, what, self.rates[rate]) for items, what, rate in terms), lanes)
