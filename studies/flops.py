"""The operations of a training step, counted by one formula for all arms.

Two operations for each multiplication with an addition in linear maps, in scores and in weighted sums; nothing for
norms, softmax or activations. The backward pass counts twice the forward pass. Attention counts the pairs of tokens
that see each other: `N (N + 1) / 2` under a causal mask. An equilibrium counts one whole application of its map, plus,
for each further step that its solver took on average, what a step costs: the query map again, and the pairs within a
block on the diagonal (causal, by forward substitution) or all pairs (elsewhere). With `self_query="input"` the query
map is applied to the start as well. The adjoint counts twice all that, and so does another gradient in its place. What
keeps a map contracting (`max_gain`) is not counted.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from implicit_attention.causal.forward_substitution import ForwardSubstitution
from implicit_attention.tasks.models import Convolution
from studies.blocks import Block, ParallelBlock, RecurrentBlock, SequenceModel
from studies.mixers import GRU, Behind, GatedDeltaNet, Implicit, Mixer, Ordinary

BACKWARD = 2  # of the forward pass's operations


def training_step(model: SequenceModel, batch: int, length: int, solver_steps: Sequence[float] = ()) -> float:
    """Return the operations of one forward and backward pass.

    Args:
        model: The model.
        batch: B.
        length: N.
        solver_steps: Steps of each equilibrium, in the order of `SequenceModel.solve`, a mean over its systems.
    """
    steps = iter(solver_steps)
    blocks = sum(_block(block, length, steps) for _ in range(model.loops) for block in model.blocks)
    ends = sum(_linear(part) for part in (model.embedding, model.head)) * length
    return batch * (1 + BACKWARD) * (blocks + ends)


def _block(block: nn.Module, length: int, steps: Iterator[float]) -> float:
    assert isinstance(block, Block)
    mlp = length * _linear(block.mlp)
    if isinstance(block, RecurrentBlock):
        again = length * (_linear(block.attention.W_K) + _linear(block.attention.W_V))  # of inputs, then of outputs
        return mlp + _mixer(block.attention, length, steps) + again
    assert isinstance(block, ParallelBlock)
    return mlp + _mixer(block.mixer, length, steps)


def _mixer(mixer: Mixer, length: int, steps: Iterator[float]) -> float:
    if isinstance(mixer, Ordinary):
        width = mixer.W_Q.out_features
        return length * (_linear(mixer) + _taps(mixer)) + _attend(_pairs(length, mixer.is_causal), width)
    if isinstance(mixer, GRU):
        return length * (_cells(mixer) + _linear(mixer.out_proj))
    if isinstance(mixer, GatedDeltaNet):
        # The state decays, is read twice, and changes by an outer product.
        state = 7 * mixer.gate.out_features**2 // mixer.num_heads
        return length * (_linear(mixer) + _taps(mixer) + state)
    if isinstance(mixer, Behind):
        return length * (_taps(mixer.front) + _cells(mixer.front)) + _mixer(mixer.mixer, length, steps)
    assert isinstance(mixer, Implicit)
    layer = mixer.layer
    pairs = _pairs(length, layer.is_causal)
    within = pairs
    if isinstance(layer.solver, ForwardSubstitution):
        block = min(length, layer.solver.block)
        within = _pairs(block, True) * length / block
    further = max(0.0, next(steps) - 1)
    asked = 0 if layer.Omega_Q is None else _linear(layer.Omega_Q)
    step = length * asked + _attend(within, layer.embed_dim)
    start = asked if layer.settings.self_query == "input" else 0
    return length * (_linear(layer) + start) + _attend(pairs, layer.embed_dim) + further * step


def _attend(pairs: float, width: int) -> float:
    return 4 * pairs * width  # q . k, and the weighted sum of v


def _pairs(length: int, is_causal: bool) -> float:
    return length * (length + 1) / 2 if is_causal else length**2


def _linear(module: nn.Module) -> int:
    """Operations of a module's linear maps for one token."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _taps(module: nn.Module) -> int:
    """Operations of a module's convolutions for one token."""
    return sum(2 * part.taps.numel() for part in module.modules() if isinstance(part, Convolution))


def _cells(module: nn.Module) -> int:
    """Operations of a module's gated recurrent units for one token."""
    units = [part for part in module.modules() if isinstance(part, nn.GRU)]
    return sum(2 * p.numel() for unit in units for name, p in unit.named_parameters() if name.startswith("weight"))
