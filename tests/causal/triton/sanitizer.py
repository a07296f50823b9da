"""What compute-sanitizer looks for on a device, looked for in Triton's interpreter, which shows every address.

Each tensor of a launch gets addresses of its own, far from all others, so that a pointer says which argument it was
made from. Only what stays within that argument's elements is taken to real memory. There each element is marked by the
program that touched it, and by how many barriers that program had passed.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

Order = Callable[[int], Sequence[int]]  # of so many programs; `range` is the interpreter's
APART = 2**44  # bytes from one argument's addresses to the next's
PHASES = 24  # bits of a mark that count barriers; the others are the program's number, from 1
SEVERAL = -1  # in place of a mark: of more than one program
AGAINST = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
RELOADED = "no barrier since load by the same lanes"  # harmless where what was loaded goes into this store alone


class Memory:
    """A storage during one launch: what loaded, stored and updated its elements, in units of the smallest ones."""

    def __init__(self, storage: torch.UntypedStorage, unit: int) -> None:
        self.base, self.unit = storage.data_ptr(), unit
        self.marks = {kind: np.zeros(-(-storage.nbytes() // unit), np.int64) for kind in AGAINST}
        self.lanes = np.zeros_like(self.marks["load"])  # a hash of all that were loaded together


class Argument:
    """A tensor of a launch, at addresses of its own from `place` on."""

    def __init__(self, name: str, tensor: torch.Tensor, place: int, memory: Memory) -> None:
        self.name, self.tensor, self.place, self.memory = name, tensor, place, memory
        self.size, self.start = tensor.element_size(), tensor.data_ptr() - memory.base
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        self.extent = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        self.own: np.ndarray | None = None
        if not tensor.is_contiguous():  # between its first and its last element are others'
            own = torch.zeros(self.extent, dtype=torch.bool)
            own.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.own = own.numpy()

    def outside(self, at: np.ndarray) -> np.ndarray:
        """How far elements are from the tensor's first or last one; 1 in a hole, 0 if they are the tensor's."""
        far = np.where(at < 0, at, np.maximum(at - (self.extent - 1), 0))
        if self.own is not None:
            far[far == 0] = ~self.own[at[far == 0]]
        return far


class Sanitizer:
    """What was launched, and what was found.

    Attributes:
        launches: How many, by kernel.
        findings: In words: the first of its kind for each function and argument of a kernel.
        excused: What was harmless.
    """

    def __init__(self, order: Order, harmless: Collection[tuple[str, str]]) -> None:
        self.order, self.harmless = order, harmless
        self.launches: Counter[str] = Counter()
        self.findings: dict[tuple[str, ...], str] = {}
        self.excused: set[tuple[str, str]] = set()

    def launch(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        """Forget the launch before, and lay out the arguments of a new one."""
        self.kernel, self.mark = kernel, 0
        self.programs: list[tuple[int, ...]] = []
        self.launches[kernel] += 1
        units: dict[int, int] = {}
        for t in tensors.values():
            base = t.untyped_storage().data_ptr()
            units[base] = min(units.get(base, t.element_size()), t.element_size())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()}
        memories = {base: Memory(storage, units[base]) for base, storage in storages.items()}
        self.arguments = [
            Argument(name, t, (i + 1) * APART, memories[t.untyped_storage().data_ptr()])
            for i, (name, t) in enumerate(tensors.items())
        ]
        self.places = {id(a.tensor): a.place for a in self.arguments}

    def begin(self, grid: tuple[int, ...], index: tuple[int, ...]) -> tuple[int, ...]:
        """Begin a program; return which one runs in the place of another."""
        if not self.programs:
            every = list(product(*map(range, grid)))
            self.turns = dict(zip(every, (every[i] for i in self.order(len(every))), strict=True))
        self.programs.append(self.turns[index])
        self.mark = len(self.programs) << PHASES
        return self.turns[index]

    def barrier(self) -> None:
        """All threads of the program have come to here."""
        self.mark += 1

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look at what a program's lanes touch; return real addresses, and which lanes may go there."""
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)
        lanes = pointers[mask]
        if not lanes.size:
            return pointers, mask
        nearest = (int(lanes[0]) + APART // 2) // APART - 1
        argument = self.arguments[min(max(nearest, 0), len(self.arguments) - 1)]
        memory = argument.memory
        at = (lanes - argument.place).view(np.int64) // argument.size
        far = argument.outside(at)
        if far.any():
            worst = np.abs(far).argmax()
            self.report("out of bounds", kind, argument, f"element {at[worst]}, {far[worst]:+d} from its own")
            mask[mask] = far == 0
            at = at[far == 0]
        real = np.where(mask, pointers - argument.place + argument.tensor.data_ptr(), 0)
        units = (at * argument.size + argument.start) // memory.unit
        if argument.size > memory.unit:
            units = (units[:, None] + np.arange(argument.size // memory.unit)).ravel()
        self.compare(kind, argument, units)
        return real, mask

    def compare(self, kind: str, argument: Argument, units: np.ndarray) -> None:
        """Look for who touched the same before, and leave marks."""
        program, marks, lanes = self.mark >> PHASES, argument.memory.marks, argument.memory.lanes
        together = hash(units.tobytes())
        if kind == "store" and len(np.unique(units)) < len(units):
            self.report("two lanes", kind, argument, "to one element")
        for before in AGAINST[kind]:
            found = marks[before][units]
            raced = (found != 0) & (found >> PHASES != program)
            if raced.any():
                other = int(found[raced][0]) >> PHASES
                who = "several programs" if other < 0 else f"program {self.programs[other - 1]}"
                element = (units[raced][0] * argument.memory.unit - argument.start) // argument.size
                self.report("race", kind, argument, f"element {element}, {before} by {who} before")
            again = found == self.mark
            if again.any():
                own = before == "load" and (lanes[units][again] == together).all()
                self.report(RELOADED if own else f"no barrier since {before}", kind, argument, "in this program")
        last = marks[kind][units]
        if kind == "load":
            lanes[units] = np.where((last == self.mark) & (lanes[units] != together), SEVERAL, together)
        marks[kind][units] = np.where((last == 0) | (last >> PHASES == program), self.mark, SEVERAL)

    def report(self, what: str, kind: str, argument: Argument, where: str) -> None:
        """Keep a finding, unless it is like one before, or known to be harmless."""
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith((__name__, "triton.")):
            frame = frame.f_back
        function, line = frame.f_code.co_name, frame.f_lineno
        if what == RELOADED and (function, argument.name) in self.harmless:
            self.excused.add((function, argument.name))
            return
        said = f"{what}: {kind} of `{argument.name}`, {where}; {self.kernel}{self.programs[-1]}, {function}:{line}"
        self.findings.setdefault((what, kind, self.kernel, function, argument.name), said)


@contextmanager
def sanitized(order: Order = range, harmless: Collection[tuple[str, str]] = ()) -> Iterator[Sanitizer]:
    """Look at all that is launched within, and fail if anything was found.

    Args:
        order: In which the programs of a launch run.
        harmless: Functions and arguments of theirs where a store without a barrier is right: what its lanes loaded
            goes into this store and nowhere else, so that no thread but the one that stores needs to have read it.
    """
    sanitizer, handle = Sanitizer(order, harmless), interpreter.TensorHandle
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    convert, to_host, set_index = interpreter._implicit_cvt, executor._init_args_hst, builder.set_grid_idx
    load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def checked(kind, pointers, mask):
        real, allowed = sanitizer.touch(kind, pointers.data, mask.data)
        return handle(real, pointers.dtype), handle(allowed, mask.dtype)

    def bound(self, args, kwargs):
        args, kwargs = to_host(self, args, kwargs)  # where there is a device, the tensors that the programs touch
        named = inspect.getcallargs(self.fn, *args, **kwargs).items()
        sanitizer.launch(self.fn.__name__, {name: t for name, t in named if isinstance(t, torch.Tensor)})
        return args, kwargs

    def placed(arg):
        found = convert(arg)
        if isinstance(arg, torch.Tensor):
            found.handle.data[:] = sanitizer.places[id(arg)]
        return found

    def new_load(self, pointers, mask, *rest):
        return load(self, *checked("load", pointers, mask), *rest)

    def new_store(self, pointers, value, mask, *rest):
        pointers, mask = checked("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def new_update(self, operation, pointers, value, mask, *rest):
        pointers, mask = checked("atomic", pointers, mask)
        return update(self, operation, pointers, value, mask, *rest)

    def refuse(*_):
        raise NotImplementedError("no kernel compares and swaps so far")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", placed)
        patch.setattr(executor, "_init_args_hst", bound)
        patch.setattr(builder, "set_grid_idx", lambda self, *at: set_index(self, *sanitizer.begin(self.grid_dim, at)))
        patch.setattr(builder, "create_masked_load", new_load)
        patch.setattr(builder, "create_masked_store", new_store)
        patch.setattr(builder, "create_atomic_rmw", new_update)
        patch.setattr(builder, "create_atomic_cas", refuse)
        patch.setattr(builder, "create_barrier", lambda self: sanitizer.barrier())
        try:
            yield sanitizer
        finally:
            assert not sanitizer.findings, "\n".join(sanitizer.findings.values())
