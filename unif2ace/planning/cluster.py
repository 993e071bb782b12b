"""A cost model of a training step on many GPUs: what is sent, how long it takes, and how much of it computing hides.

A model, not a measurement: it rests on `Cluster`, whose numbers are assumptions. The bytes are those of FSDP2's and of
`moe.parallel_experts`' collectives and were checked against counted ones of two processes. Stragglers, data, the
optimizer's own time and the norm of the gradients are left out.

    forward    all-gather of the next layer's weights beside a layer's compute; the root's and the first layer's before
    backward   all-gather of the next layer's weights and reduce-scatter of the last one's gradients beside a layer's
               compute; the root's reduce-scatter after it. Sharded within a node: all-reduce of the shards across nodes
    experts    over the GPUs of a node: rows to those that have their experts and back, in line with compute; after the
               backward an all-reduce of the experts' gradients with their copies on other nodes. Nothing hides either
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unif2ace.configs import UniF2aceConfig
from unif2ace.planning.activations import FLOAT32
from unif2ace.planning.plan import Training, counts, forward_flops

GATHER, SCATTER, REDUCE, EXCHANGE = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
_EXPERT_TENSORS = 4  # of a layer: weights and biases, in and out
_SMALL_EXCHANGES = 4  # of counts, experts and weights, and of the weights' gradients: latency alone


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines; `words` says it line by line.

    Attributes:
        peak: FLOP/s of a GPU. share: of it, reached while a GPU computes.
        nvlink, network: bytes/s of a GPU each way, within a node and between nodes.
        base, nvlink_step, network_step: seconds of a collective, and of each step of its ring or tree.
        overlap: of a layer's compute time, beside which its neighbours' collectives can run.
    """

    gpus_per_node: int = 8
    peak: float = 989e12
    share: float = 0.4
    nvlink: float = 0.8 * 450e9
    network: float = 0.8 * 50e9
    base: float = 8.4e-6
    nvlink_step: float = 3.4e-6
    network_step: float = 9.6e-6
    overlap: float = 0.8

    @property
    def words(self) -> list[str]:
        base, within, between = (f"{1e6 * each:g}" for each in (self.base, self.nvlink_step, self.network_step))
        return [
            f"{self.gpus_per_node} GPUs a node, each computing at {self.share:.0%} of {self.peak / 1e12:.0f} TFLOP/s "
            "(by default an H100's or H200's in dense bfloat16)",
            f"a GPU sends {self.nvlink / 1e9:.0f} GB/s within its node (80% of NVLink 4) and {self.network / 1e9:.0f} "
            "GB/s to others (80% of an adapter of 400 Gb/s for each GPU)",
            f"a collective takes {base} us, and {within} us more for each step of its ring within a node, {between} us "
            "between nodes (NCCL's own tuning model for large messages)",
            f"collectives of a layer run beside {self.overlap:.0%} of its neighbour's compute, one after another",
        ]


@dataclass(frozen=True)
class Layout:
    """How a model lies on GPUs.

    Attributes:
        gpus: all of them.
        within_node: parameters are sharded within a node and repeated by every node (HSDP), not sharded over all.
        expert_ranks: GPUs next to each other that share a layer's experts, whole nodes of them; 1 for none that do.
    """

    gpus: int
    within_node: bool = False
    expert_ranks: int = 1

    def __str__(self) -> str:
        name = "HSDP" if self.within_node else "FSDP"
        return name + (f", experts over {self.expert_ranks}" if self.expert_ranks > 1 else "")


@dataclass(frozen=True)
class Cost:
    """Of one collective: bytes that a GPU sends, and seconds."""

    sent: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.sent + other.sent, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.sent * times, self.seconds * times)


@dataclass(frozen=True)
class StepCost:
    """Of a step: seconds of compute; collectives by kind, hidden or not; seconds of them that nothing hides."""

    compute: float
    collectives: dict[str, Cost]
    exposed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def gather(cluster: Cluster, size: float, ranks: int) -> Cost:
    """All-gather to, or reduce-scatter of, `size` bytes in a ring over `ranks` GPUs, of one node or of whole ones.

    A node's adapters carry what the others send it, together; NVLink carries all that a GPU passes on.
    """
    if ranks == 1:
        return Cost()
    each_node = min(ranks, cluster.gpus_per_node)
    nodes = ranks // each_node
    sent = size * (ranks - 1) / ranks
    within = sent / cluster.nvlink if each_node > 1 else 0.0
    between = size * (nodes - 1) / nodes / (each_node * cluster.network)
    steps = (ranks - nodes) * cluster.nvlink_step + (nodes - 1) * cluster.network_step
    return Cost(sent, cluster.base + steps + max(within, between))


def reduce_across(cluster: Cluster, size: float, nodes: int) -> Cost:
    """All-reduce of `size` bytes of a GPU with those in its place on the other nodes; a ring or a tree, the faster."""
    if nodes == 1:
        return Cost()
    sent = 2 * size * (nodes - 1) / nodes
    ring = 2 * (nodes - 1) * cluster.network_step + sent / cluster.network
    tree = 2 * math.ceil(math.log2(nodes)) * cluster.network_step + 2 * size / cluster.network
    return Cost(sent, cluster.base + min(ring, tree))


@dataclass(frozen=True)
class Dispatch:
    """Rows of expert parallelism in one layer, expected under an even choice of a group's experts.

    Attributes:
        sent: rows that a GPU sends to others to have them computed, the mean over GPUs.
        fullest: the most rows that a GPU sends or receives; fullest_between: those to or from other nodes.
        load: slots of the GPU with the most of them over the mean.
    """

    sent: float
    fullest: float
    fullest_between: float
    load: float


def dispatch(config: UniF2aceConfig, tokens: Sequence[float], ranks: int, each_node: int) -> Dispatch:
    """What `moe.parallel_experts` sends, with `tokens` of each group on every GPU.

    A token of group g goes to a rank that holds m of its N experts with the probability 1 - C(N - m, K) / C(N, K),
    and surely to one that holds a shared slot.
    """
    moe = config.token_moe
    assert moe is not None
    held = _held(config, ranks)
    rows = [0.0] * ranks  # that each GPU sends to rank r, were it another's
    slots = [0.0] * ranks
    for group, (count, experts) in enumerate(zip(tokens, moe.experts)):
        for rank, (routed, shared) in enumerate(held[group]):
            miss = math.comb(experts - routed, moe.top_k) / math.comb(experts, moe.top_k)
            rows[rank] += count * (1.0 if shared else 1 - miss)
            slots[rank] += count * (moe.top_k * routed / experts + shared)
    leaving = [sum(rows) - rows[rank] for rank in range(ranks)]
    arriving = [(ranks - 1) * rows[rank] for rank in range(ranks)]
    node = [rank // each_node for rank in range(ranks)]
    out = [sum(rows[r] for r in range(ranks) if node[r] != node[rank]) for rank in range(ranks)]
    into = [rows[rank] * sum(each != node[rank] for each in node) for rank in range(ranks)]
    mean = sum(slots) / ranks
    return Dispatch(sum(leaving) / ranks, max(leaving + arriving), max(out + into), max(slots) / mean)


def _held(config: UniF2aceConfig, ranks: int) -> list[list[tuple[int, int]]]:
    """(routed experts, shared slots) of each group on each rank, as `moe.local_experts` cuts them."""
    moe = config.token_moe
    assert moe is not None
    shared = moe.shared_width // moe.width
    owner = [(group, 0) for group, size in enumerate(moe.experts) for _ in range(size)]
    owner += [(group, 1) for group in range(len(moe.experts)) for _ in range(shared)]
    share = -(-len(owner) // ranks)
    parts = [owner[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return [[(part.count((group, 0)), part.count((group, 1))) for part in parts] for group in range(len(moe.experts))]


def expert_parameters(config: UniF2aceConfig) -> int:
    """Of one layer's experts, shared ones included."""
    moe = config.token_moe
    if moe is None:
        return 0
    held = sum(moe.experts) + len(moe.experts) * (moe.shared_width // moe.width)
    return held * (2 * config.hidden_size * moe.width + moe.width + config.hidden_size)


def step_cost(cluster: Cluster, training: Training, layout: Layout) -> StepCost:
    """The step of every GPU; the rows of a GPU are those of `training.step`, whatever the number of GPUs.

    Raises:
        ValueError: naming the argument.
    """
    _check(cluster, training.config, layout)
    config, size, number = training.config, training.bytes, counts(training.config)
    layers, run = config.num_hidden_layers, 2 if training.checkpointing == "block" else 1  # forwards of a layer
    rate = cluster.peak * cluster.share
    parts = {part: flops / rate for part, flops in forward_flops(config, training.step).items()}
    exchange, load = Cost(), 1.0
    if layout.expert_ranks > 1:
        rows = dispatch(config, _tokens(training), layout.expert_ranks, cluster.gpus_per_node)
        load = rows.load
        exchange = _exchange(cluster, rows, size.compute * config.hidden_size, layout.expert_ranks)
    outside = sum(parts.pop(part, 0.0) for part in ("head", "injection"))
    parts["experts"] = parts.get("experts", 0.0) * load  # all wait for the fullest rank
    forward = sum(parts.values()) / layers
    backward = (1 + run) * forward

    shards = min(cluster.gpus_per_node, layout.gpus) if layout.within_node else layout.gpus
    apart = expert_parameters(config) if layout.expert_ranks > 1 else 0  # of a layer, not FSDP's
    block, root = number.block - apart, number.root
    weights, root_weights = (gather(cluster, size.weight * each, shards) for each in (block, root))
    gradients, root_gradients = (gather(cluster, FLOAT32 * each, shards) for each in (block, root))
    nodes = layout.gpus // shards
    across, root_across = (reduce_across(cluster, FLOAT32 * each / shards, nodes) for each in (block, root))
    groups = layout.gpus // layout.expert_ranks  # of ranks that hold all experts, copies of one another
    small = reduce_across(cluster, 0.0, groups) * (_EXPERT_TENSORS - 1)  # each is summed by itself
    copies = reduce_across(cluster, FLOAT32 * apart / layout.expert_ranks, groups) + small if apart else Cost()

    def left(seconds: float, compute: float) -> float:
        return max(0.0, seconds - cluster.overlap * compute)

    exposed = root_weights.seconds + weights.seconds + (layers - 1) * left(weights.seconds, forward)
    exposed += layers * left(weights.seconds + gradients.seconds + across.seconds + copies.seconds, backward)
    exposed += root_gradients.seconds + root_across.seconds
    exchanges = exchange * (layers * (1 + run))
    exposed += exchanges.seconds
    return StepCost(
        layers * (forward + backward) + 3 * outside,
        {
            GATHER: weights * (2 * layers) + root_weights, SCATTER: gradients * layers + root_gradients,
            REDUCE: (across + copies) * layers + root_across, EXCHANGE: exchanges,
        },
        exposed,
    )  # fmt: skip


def layouts(gpus: int, cluster: Cluster, config: UniF2aceConfig) -> list[Layout]:
    """Those worth comparing: sharded over all and within a node, each with its experts whole and over a node."""
    node = cluster.gpus_per_node
    ranks = [1] if config.token_moe is None or gpus % node else [1, node]
    return [Layout(gpus, within, each) for each in ranks for within in (False, True)]


def efficiency(cluster: Cluster, training: Training, layout: Layout) -> float:
    """Of a GPU that computes alone, the share of its rate that each of `layout.gpus` keeps."""
    return step_cost(cluster, training, Layout(1)).compute / step_cost(cluster, training, layout).seconds


def _tokens(training: Training) -> tuple[float, float]:
    """Of a GPU and group, t2i first; plain text goes with mmu."""
    step = training.step
    drawn = step.routed * step.t2i / step.rows
    return drawn, step.routed - drawn


def _exchange(cluster: Cluster, rows: Dispatch, row: float, ranks: int) -> Cost:
    """Of one layer and pass: rows there and rows back, and the small collectives with them."""
    within = (rows.fullest - rows.fullest_between) * row / cluster.nvlink
    seconds = max(within, rows.fullest_between * row / cluster.network)
    step = cluster.network_step if ranks > cluster.gpus_per_node else cluster.nvlink_step
    latency = cluster.base + step
    return Cost(2 * rows.sent * row, 2 * (seconds + latency) + _SMALL_EXCHANGES / 2 * latency)


def _check(cluster: Cluster, config: UniF2aceConfig, layout: Layout) -> None:
    per_node, ranks = cluster.gpus_per_node, layout.expert_ranks
    if layout.gpus < 1 or (layout.gpus > per_node and layout.gpus % per_node):
        raise ValueError(f"gpus: expected one node's at most, or whole nodes of {per_node}, got {layout.gpus}")
    node = min(per_node, layout.gpus)
    if ranks != 1 and (ranks < 1 or ranks % node or layout.gpus % ranks):
        raise ValueError(f"expert_ranks: expected 1, or whole nodes that divide the {layout.gpus} GPUs, got {ranks}")
    if ranks > 1 and config.token_moe is None:
        raise ValueError("expert_ranks: expected 1 for a model without token-level experts, got " + str(ranks))
