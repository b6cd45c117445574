"""Times of GPU work, and the bandwidths that bound them."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
REPLAYS = 20


class Timer:
    """Median time of a call, over calls whose data take turns.

    On a GPU the calls are captured in a CUDA graph, as an engine runs them, and timed by
    events; capturing also proves that no call waits for the device. On the CPU, for
    rehearsals, the clock is read around each call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def milliseconds(self, calls: Sequence[Call], captured: bool = True) -> float:
        """Of one call; each has data of its own. Long copies need no graph."""
        if self.device.type == "cpu":
            return statistics.median(self._seconds(call) for call in calls) * 1e3
        for call in calls:  # compile outside the graph
            call()
        torch.cuda.synchronize()
        replay = self._capture(calls) if captured else lambda: [call() for call in calls]
        for _ in range(3):
            replay()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(REPLAYS)
        ]
        for start, end in events:
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / len(calls)

    @staticmethod
    def _capture(calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def launch_milliseconds(self, call: Call) -> float:
        """Time that the host spends to launch a call outside a graph; 0 in a rehearsal."""
        if self.device.type == "cpu":
            return 0.0
        torch.cuda.synchronize()
        times = [self._seconds(call) for _ in range(10)]
        torch.cuda.synchronize()
        return statistics.median(times) * 1e3

    @staticmethod
    def _seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Floors:
    """Measured bandwidths, bytes a second.

    hbm: read and written by a copy on the device. pcie: host to device, from pinned memory
    by the copy engine.
    """

    hbm: float
    pcie: float

    def milliseconds(self, hbm_bytes: float, pcie_bytes: float) -> float:
        """The least time for this traffic, both ways at once."""
        return 1e3 * max(hbm_bytes / self.hbm, pcie_bytes / self.pcie)


def measure_floors(timer: Timer, num_bytes: int) -> Floors:
    """Copy `num_bytes` within the device, and from pinned host memory to it."""
    cuda = timer.device.type == "cuda"
    source = torch.empty(num_bytes, dtype=torch.uint8, device=timer.device).fill_(1)
    target = torch.empty_like(source)
    hbm = timer.milliseconds([lambda: target.copy_(source)], captured=False)
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=cuda).fill_(1)
    pcie = timer.milliseconds([lambda: target.copy_(host, non_blocking=True)], captured=False)
    return Floors(2e3 * num_bytes / hbm, 1e3 * num_bytes / pcie)
