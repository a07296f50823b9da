"""The computations of the demo: the original example, solvers on a real text, three models that learn recall."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from implicit_attention import (
    Anderson,
    Broyden,
    ForwardSubstitution,
    ImplicitQueryAttention,
    ImplicitQueryAttentionLinearV,
    NewtonKrylov,
    Picard,
    diagnostics,
    fixed_point,
)
from implicit_attention.equilibrium.solvers import Method, Solution
from implicit_attention.tasks import OrdinaryAttention, Recall, Step, TokenModel, standard_library, train, windows

MAX_STEPS = 100
SOLVERS: dict[str, Method] = {
    "Picard": Picard(max_steps=MAX_STEPS),
    "Picard, damped": Picard(damping=0.5, max_steps=MAX_STEPS),
    "Anderson": Anderson(max_steps=MAX_STEPS),
    "Broyden": Broyden(max_steps=MAX_STEPS),
    "Newton-Krylov": NewtonKrylov(max_steps=MAX_STEPS),
    "Forward substitution": ForwardSubstitution(),
}
IMPLICIT, ORDINARY = "implicit-query attention", "ordinary attention"
CONVOLVED = "ordinary, convolved keys"
TAPS = 2  # of the convolution


@dataclass(frozen=True)
class SeedExample:
    """The original example of the layer.

    Attributes:
        differences: `|y_{t+1} - y_t|` of its ten steps, Frobenius norm.
        gradient: Gradient of the output's sum by the input, `[1, 4, 8]`.
    """

    differences: list[float]
    gradient: Tensor


def seed_example(seed: int) -> SeedExample:
    """Run the example: one sequence of four tokens of size eight, ten steps.

    Args:
        seed: Seed of weights and input.

    Returns:
        Its differences and gradient.
    """
    torch.manual_seed(seed)
    x = torch.randn(1, 4, 8, requires_grad=True)
    y, history = ImplicitQueryAttentionLinearV(8, n_iters=10)(x, track=True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    differences = [torch.linalg.vector_norm(b - a).item() for a, b in pairwise(history)]
    return SeedExample(differences, gradient)


@dataclass(frozen=True)
class TextCase:
    """A real text and a layer that every solver solves.

    Attributes:
        name: How the layer's weights were made.
        layer: The layer, with `on_failure="ignore"`.
        x: The embedded text, `[B, N, D]`.
        radius: Spectral radius at the equilibrium, `[B]`.
    """

    name: str
    layer: ImplicitQueryAttention
    x: Tensor
    radius: Tensor


def text_cases(seed: int, *, length: int = 256, gains: tuple[float, ...] = (1.0, 12.0)) -> Iterator[TextCase]:
    """Embed windows of the standard library's source, and make layers with larger and larger queries.

    Args:
        seed: Seed of windows and weights.
        length: Bytes in a window, N.
        gains: Factors on `Omega_Q`. 1 is the layer as initialised. Training makes scores grow, as larger factors do.

    Yields:
        One case for each gain.
    """
    generator = torch.Generator().manual_seed(seed)
    text = windows(standard_library(1_000_000), 4, length, generator)
    torch.manual_seed(seed)
    embed, positions = nn.Embedding(256, 64), torch.randn(length, 64)
    x = (embed(text.long()) + 0.5 * positions).detach()
    base = ImplicitQueryAttention(64, num_heads=4).state_dict()
    for gain in gains:
        # Without a mask this layer collapses to the mean of the values, which every solver finds at once.
        layer = ImplicitQueryAttention(64, num_heads=4, is_causal=True, solver=SOLVERS["Anderson"], on_failure="ignore")
        layer.load_state_dict(base | {"Omega_Q.weight": gain * base["Omega_Q.weight"]})
        name = "as initialised" if gain == 1 else f"queries {gain:g} times larger"
        yield TextCase(name, layer, x, diagnostics.spectral_radius(layer, x))


@dataclass(frozen=True)
class Settled:
    """The result of one solver.

    Attributes:
        solver: Its name.
        solution: The solution.
        seconds: Median time of a solve.
    """

    solver: str
    solution: Solution
    seconds: float


def settle(case: TextCase, solver: str, *, repeats: int = 3) -> Settled:
    """Solve a case.

    Args:
        case: The case.
        solver: Name of one of `SOLVERS`.
        repeats: Timed solves, after one that is not timed.

    Returns:
        The solution and the time of a solve.
    """
    case.layer.solver = SOLVERS[solver]
    times = []
    with torch.no_grad():
        solution = case.layer.solve(case.x)
        for _ in range(repeats):
            begun = time.perf_counter()
            case.layer.solve(case.x)
            times.append(time.perf_counter() - begun)
    return Settled(solver, replace(solution, history=None), statistics.median(times))


@dataclass(frozen=True)
class Runner:
    """A model in training.

    Attributes:
        model: The model.
        steps: The results of its training steps so far.
    """

    model: TokenModel
    steps: list[Step] = field(default_factory=list)

    @property
    def curve(self) -> dict[int, float]:
        """Held-out accuracy by step."""
        return {s.step: s.accuracy for s in self.steps if s.accuracy is not None}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def first(self, accuracy: float) -> int | None:
        """Return the first step at which the measured accuracy is at least this, None if there is none."""
        return next((step for step, reached in self.curve.items() if reached >= accuracy), None)


def runners(seed: int, task: Recall) -> dict[str, Runner]:
    """Make the models, with the same sizes, options and seed.

    The settings are the recommended ones, but with learned positions, which the ordinary layers have too. The implicit
    layer has `self_query="input"`: its equilibrium is unique for any weights, and it is solved exactly. The convolution
    on the keys of the third model binds a value to the key before it, which is all that this task needs.

    Args:
        seed: Seed of the weights.
        task: The task they learn.

    Returns:
        The models by name, untrained.
    """
    made = {}
    for name in (ORDINARY, CONVOLVED, IMPLICIT):
        torch.manual_seed(seed)
        taps = TAPS if name == CONVOLVED else 0
        layer: nn.Module = OrdinaryAttention(64, num_heads=4, is_causal=True, qk_norm=True, taps=taps)
        if name == IMPLICIT:
            layer = ImplicitQueryAttention.for_causal_lm(64, 4, positions=None, out_proj=False)
        made[name] = Runner(TokenModel(task.vocabulary, task.length, layer))
    return made


def race(entrants: dict[str, Runner], task: Recall, *, steps: int, seed: int) -> Iterator[tuple[str, Step]]:
    """Train the models in turn, one step each, on the same data.

    Args:
        entrants: The models by name. Their lists of steps grow.
        task: The task they learn.
        steps: Training steps of each model.
        seed: Seed of the data.

    Yields:
        The name of a model and the result of its step.
    """
    running = [train(runner.model, task, steps=steps, seed=seed, held_out=512) for runner in entrants.values()]
    for taken in zip(*running, strict=True):
        for (name, runner), step in zip(entrants.items(), taken, strict=True):
            runner.steps.append(step)
            yield name, step


def attention_maps(runner: Runner, task: Recall, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return the trained layer's attention at the first iterations and at the last, on one new sequence.

    Args:
        runner: The implicit model.
        task: Its task.
        seed: Seed of the sequence.

    Returns:
        Maps `[H, N, N]` by title, and the names of the N tokens.
    """
    tokens = task.batch(1, torch.Generator().manual_seed(seed + 2_000_003)).tokens
    layer = runner.model.attention
    assert isinstance(layer, ImplicitQueryAttention)
    with torch.no_grad():
        x = runner.model.embed(tokens)
        # Forward substitution has no iterates of the whole sequence, so plain iteration is used to show some.
        function, args, start = layer.equation(x)
        history = fixed_point(function, start, args, solver=Picard(max_steps=x.shape[-2]), history=True).history
        assert history is not None
        function, args, _ = layer.equation(x)
        wanted = {f"iteration {t}": y for t, y in enumerate(history[:3])}
        wanted[f"settled (iteration {len(history) - 1})"] = history[-1]
        maps = {title: function.weights(y, *args)[0] for title, y in wanted.items()}
    return maps, [f"k{t}" if t < task.keys else f"v{t - task.keys}" for t in tokens[0].tolist()]
