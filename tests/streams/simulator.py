"""A device for tests: its memory is the host's, its streams do what CUDA allows them to, in an order that is drawn.

Whatever is enqueued is deferred. At every call, and while the host waits, operations whose turn it may be are executed
in the order drawn; a copy scribbles over its target first, and only in a later step brings the bytes. Beside executing,
the simulator keeps the order that the program has asked for (`order`), and records what is not ordered but has to be.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import MemoryBudgetError
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event
from tests.streams.order import HOST, Accesses, Clock, Fault, Moment, join

PAGE = 4096


class StreamError(AssertionError):
    """The program can't go on."""


@dataclass
class Operation:
    """Something enqueued: it runs in steps once everything in `requires` has run, and nothing before it on the stream
    is left.
    """

    moment: Moment
    steps: deque[Callable[[], None]] = field(default_factory=deque)
    requires: list[Operation] = field(default_factory=list)
    done: bool = False
    ended: float = 0.0
    """When a device whose work takes as long as `SimulatedDevice.takes` says would be done with it."""


class SimulatedEvent:
    """See `Event`."""

    def __init__(self, device: SimulatedDevice, timed: bool = False) -> None:
        self.device, self.timed = device, timed
        self.marked: Operation | None = None
        self.closed = False

    def record(self, stream: Stream) -> None:
        with self.device.lock:
            self.marked = self.device.enqueue(stream)

    def before(self, stream: Stream) -> None:
        assert not self.closed
        with self.device.lock:
            if self.marked is not None:
                self.device.enqueue(stream, requires=[self.marked])

    def wait(self) -> None:
        with self.device.lock:
            if self.marked is not None:
                self.device.host_waits(self.marked)

    def done(self) -> bool:
        """Now and then something runs meanwhile."""
        with self.device.lock:
            self.device.run_some()
            if self.marked is not None and self.marked.done:
                self.device.host_waits(self.marked)
            return self.marked is None or self.marked.done

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, SimulatedEvent)
        assert self.timed
        assert earlier.timed
        assert self.marked is not None
        assert earlier.marked is not None
        assert self.marked.done
        return self.marked.ended - earlier.marked.ended

    def close(self) -> None:
        with self.device.lock:
            self.closed = True
            if self.marked is not None and not self.marked.done:
                self.device.report(Fault.CLOSED)


class SimulatedDevice:
    """A `StreamDriver`. `order` is consumed in turn, over and over; 0s leave everything to the last moment."""

    def __init__(self, order: Sequence[int] = (0,), pinning: str | None = None) -> None:
        """`pinning`: why it refuses to pin memory; None: it doesn't."""
        self.device = torch.device("cpu")
        self.pinning = pinning
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.events: list[SimulatedEvent] = []
        self.executed = 0
        self.most_copies = 0
        """Copies enqueued on the copy stream and not executed at once."""
        self.size = 2**40
        """Bytes of device memory."""
        self.allocated = self.most_allocated = 0
        """Bytes of it in use, now and at most so far."""
        self.takes = 0.0, 0.0
        """Seconds of a copy and of a launch; the order in which they are executed is another matter."""
        self.now = 0.0
        """The host's clock, which only waiting for the device moves, and tests."""
        self._order, self._drawn = list(order) or [0], 0
        self._queues: dict[Stream, deque[Operation]] = {stream: deque() for stream in Stream}
        self._ended = dict.fromkeys(Stream, 0.0)
        """When the last operation of each ends."""
        self._clocks: dict[Stream, Clock] = {stream: {} for stream in Stream}
        self._host: Clock = {}
        self._memory: dict[int, Accesses] = {}
        """By the address at which a slab begins."""
        self._pinned: dict[int, int] = {}
        """Where pinned memory begins, and where it ends."""
        self._copies: list[tuple[int, Operation]] = []
        """Host memory of copies under way, by address."""
        self._declared: set[int] = set()
        """What the work that is running has said it reads, by address."""
        self._failure: BaseException | None = None

    # What the protocol asks for

    def allocate(self, nbytes: int) -> Tensor:
        memory = torch.full((nbytes + PAGE,), 0xFF, dtype=torch.uint8)  # NaN, whatever it is read as
        start = -memory.data_ptr() % PAGE  # where a slab lies decides how products with it are rounded
        with self.lock:
            if self.allocated + nbytes > self.size:
                raise MemoryBudgetError(f"the simulated device refused {nbytes} bytes, {self.allocated} being in use")
            self.allocated += nbytes
            self.most_allocated = max(self.most_allocated, self.allocated)
        return memory[start : start + nbytes]

    def free(self, memory: Tensor) -> None:
        """Whoever still reads it finds NaN."""
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        with self.lock:
            moment = self._host_moment()
            for address in [one for one in self._memory if begin <= one < end]:
                if self._memory.pop(address).write(moment) is not None:
                    self.report(Fault.GIVEN_BACK)
            self.allocated -= memory.numel()
            memory.fill_(0xFF)

    def pin(self, memory: Tensor) -> str | None:
        assert memory.numel() % PAGE == memory.data_ptr() % PAGE == 0
        if self.pinning is None:
            self._pinned[memory.data_ptr()] = memory.data_ptr() + memory.numel()
        return self.pinning

    def unpin(self, memory: Tensor) -> None:
        with self.lock:
            end = self._pinned.pop(memory.data_ptr())
            if any(memory.data_ptr() <= source < end and not copy.done for source, copy in self._copies):
                self.report(Fault.FREED)

    def move(self, source: Tensor, target: Tensor) -> None:
        with self.lock:
            moment = self._host_moment()
            self._check(self._accesses(source).read(moment))
            self._check(self._accesses(target).write(moment))
            target.copy_(source)

    def event(self, *, timed: bool = False) -> SimulatedEvent:
        event = SimulatedEvent(self, timed)
        self.events.append(event)
        return event

    def copy(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        assert source.numel() == target.numel()
        with self.lock:
            pinned = self._is_pinned(source)
            if not pinned:  # read before the call returns
                self._check(self._accesses(source).read(self._host_moment()))
                source = source.clone()
            copy = self.enqueue(stream, [lambda: _fill(target), lambda: _bring(source, target)], takes=self.takes[0])
            if pinned:
                self._check(self._accesses(source).read(copy.moment))
            self._note_copy(source, copy)
            self._check(self._accesses(target).write(copy.moment))

    def fetch(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        assert source.numel() == target.numel()
        with self.lock:
            copy = self.enqueue(stream, [lambda: _fill(target), lambda: _bring(source, target)])
            self._note_copy(target, copy)
            self._check(self._accesses(source).read(copy.moment))
            self._check(self._accesses(target).write(copy.moment))
            if not self._is_pinned(target):
                self.host_waits(copy)

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        with self.lock:
            work = self.enqueue(stream, [lambda: self._run(fn, reads)], takes=self.takes[1])
            for slab in reads:
                self._check(self._accesses(slab).read(work.moment))
            for slab in writes:
                self._check(self._accesses(slab).write(work.moment))

    def join(self, stream: Stream) -> None:
        """What torch computes next runs at once, so that everything on `stream` has to run before. The host has not
        waited for it, though: what it enqueues next is ordered after nothing more than before.
        """
        with self.lock:
            while self._queues[stream]:
                self._step()
            self._raise_failure()

    def finish(self) -> None:
        with self.lock:
            for stream, queue in self._queues.items():
                while queue:
                    self._step()
                join(self._host, self._clocks[stream])
            self._raise_failure()

    # What tests ask for

    def host_writes(self, address: int) -> None:
        """The host fills the host memory that begins at `address`."""
        with self.lock:
            self._check(self._memory.setdefault(address, Accesses()).write(self._host_moment()))

    def host_reads(self, memory: Tensor) -> None:
        """The host reads."""
        with self.lock:
            self._check(self._accesses(memory).read(self._host_moment()))

    def work_reads(self, memory: Tensor) -> None:
        """The work that is running does."""
        if memory.data_ptr() not in self._declared:
            self.report(Fault.UNDECLARED)

    def check(self) -> None:
        """Raise unless everything was ordered, everything enqueued has run, and every event was closed."""
        with self.lock:
            if any(not event.closed for event in self.events):
                self.report(Fault.LEAK)
            if any(self._queues.values()):
                self.report(Fault.LOST)
            if self.faults:
                raise StreamError("; ".join(sorted({str(fault) for fault in self.faults})))

    # The rest is for events

    def report(self, fault: Fault) -> None:
        self.faults.append(fault)

    def enqueue(
        self,
        stream: Stream,
        steps: Sequence[Callable[[], None]] = (),
        requires: Sequence[Operation] = (),
        takes: float = 0.0,
    ) -> Operation:
        """Put an operation at the end of a stream; an event is one without steps."""
        clock = self._clocks[stream]
        join(clock, self._host)
        for operation in requires:
            join(clock, operation.moment.clock)
        clock[stream] = clock.get(stream, 0) + 1
        operation = Operation(Moment(stream, clock[stream], dict(clock)), deque(steps), list(requires))
        begins = max([self.now, self._ended[stream], *(one.ended for one in requires)])
        operation.ended = self._ended[stream] = begins + takes
        self._queues[stream].append(operation)
        self.run_some()
        return operation

    def run_some(self) -> None:
        for _ in range(self._draw() % 4):
            if self._ready():
                self._step()

    def host_waits(self, operation: Operation) -> None:
        while not operation.done:
            self._step()
        self.now = max(self.now, operation.ended)
        join(self._host, operation.moment.clock)

    def _step(self) -> None:
        """Execute a step of one of the operations whose turn it may be."""
        ready = self._ready()
        if not ready:
            self.report(Fault.STUCK)
            raise StreamError(Fault.STUCK)
        queue = ready[self._draw() % len(ready)]
        operation = queue[0]
        if operation.steps:
            operation.steps.popleft()()
            self.executed += 1
        if not operation.steps:
            operation.done = True
            operation.requires.clear()
            queue.popleft()

    def _ready(self) -> list[deque[Operation]]:
        return [queue for queue in self._queues.values() if queue and all(one.done for one in queue[0].requires)]

    def _draw(self) -> int:
        self._drawn += 1
        return self._order[self._drawn % len(self._order)]

    def _run(self, fn: Callable[[], None], reads: Sequence[Tensor]) -> None:
        self._declared = {slab.data_ptr() for slab in reads}
        tracing = sys.gettrace()
        sys.settrace(None)  # a device knows nothing of the interrupts of the thread that has it work, ...
        try:
            with torch.inference_mode():  # ... nor of its mode
                fn()
        except BaseException as error:
            self._failure = error
        finally:
            sys.settrace(tracing)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _note_copy(self, host: Tensor, copy: Operation) -> None:
        self._copies = [(start, one) for start, one in self._copies if not one.done]
        self._copies.append((host.data_ptr(), copy))
        brought = sum(one.moment.component == Stream.COPY for _start, one in self._copies)
        self.most_copies = max(self.most_copies, brought)

    def _is_pinned(self, memory: Tensor) -> bool:
        return any(start <= memory.data_ptr() < end for start, end in self._pinned.items())

    def _accesses(self, memory: Tensor) -> Accesses:
        return self._memory.setdefault(memory.data_ptr(), Accesses())

    def _host_moment(self) -> Moment:
        self._host[HOST] = self._host.get(HOST, 0) + 1
        return Moment(HOST, self._host[HOST], dict(self._host))

    def _check(self, fault: Fault | None) -> None:
        if fault is not None:
            self.report(fault)


class WatchedStore:
    """A store that tells the device of all that the host writes."""

    def __init__(self, store: ExpertStore, device: SimulatedDevice) -> None:
        self.store = store
        self.simulated = device

    def read(self, key: ExpertKey, slab: memoryview) -> int:
        self.simulated.host_writes(ctypes.addressof(ctypes.c_char.from_buffer(slab)))
        return self.store.read(key, slab)

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)


def _fill(target: Tensor) -> None:
    target.fill_(0xFF)


def _bring(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
