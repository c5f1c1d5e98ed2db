"""Waits that are too long: why, asked of all ranks beside MPI, and told once for each cause.

The engine of a rank that waits tells a thread here. One rank asks all others and tells what `verdict.py` makes of their
answers: rank 0, or the lowest that answers. The others see that they are asked, and leave it at that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from . import _core, whereabouts
from .config import LogLevel
from .outofband import Channel, Silence
from .runtime import Runtime
from .verdict import Rank, Verdict, judge

__all__ = ["watch"]

_ANSWER_S = 1.0
_PATIENT_S = 1.5
_PRESENT_S = 0.5
_ENGINE_S = 0.3  # for its driver to make way
_LEADER_S = 0.3  # for rank 0 to ask
_LATER_S, _LATEST_S = 0.05, 3.0  # and how much more for each rank
_AGAIN_S = 0.5  # after which it is asked again
_END_S = 3.0


def watch(state: Runtime, channel: Channel) -> None:
    """Explain stalls, until the engine has shut down."""
    watcher = _Watcher(state, channel)
    thread = threading.Thread(target=watcher.run, name="collective stalls", daemon=True)
    state.engine.report_stalls()
    thread.start()
    state.at_end.append(lambda: thread.join(_END_S))


class _Watcher:
    def __init__(self, state: Runtime, channel: Channel) -> None:
        self._engine = state.engine
        self._channel = channel
        self._patience = state.patience
        self._file = state.config.verdict_file
        self._last_asked = self._explained = float("-inf")
        self._told: list[Verdict] = []
        channel.answers["present"] = lambda _: True
        channel.answers["waits"] = self._answer
        channel.answers["explain"] = self._explain_for
        channel.answers["processes"] = lambda pids: {str(pid): _process_state(pid) for pid in pids}

    def run(self) -> None:
        while (text := self._engine.take_stall()) is not None:
            try:
                if text and self._channel.rank > 0:
                    self._leave_to_a_lower_rank()
                else:
                    self._explain({})
            except Exception as error:  # whatever it is, the wait is told
                _core.log(LogLevel.WARNING, f"{text}\n  (more was to be told, but: {error!r})")

    def _answer(self, by: Any) -> dict[str, Any]:
        if by != self._channel.rank:
            self._last_asked = time.monotonic()
        at, is_in_package = whereabouts.where()
        waits = self._engine.waits(_ENGINE_S)
        return {"waits": waits, "at": at, "is_in_package": is_in_package, "stack": whereabouts.stack()}

    def _explain_for(self, about: Any) -> bool:
        del about
        if time.monotonic() > self._explained + _AGAIN_S:  # others may have asked for the same
            self._engine.put_stall("")
        return True

    def _leave_to_a_lower_rank(self) -> None:
        """See whether one explains it already; else ask the lowest that answers; explain it if none does."""
        begin = time.monotonic()
        # One after the other, so that the first asks before the rest wonder.
        while time.monotonic() < begin + _LEADER_S + min(self._channel.rank * _LATER_S, _LATEST_S):
            if self._last_asked > begin - _ANSWER_S:
                return
            time.sleep(_LEADER_S / 10)
        silent: dict[int, Silence] = {}
        # Batches that grow: a node of a hundred ranks that is dead costs no more than a few times the patience.
        first, count = 0, 1
        while first < self._channel.rank:
            batch = range(first, min(first + count, self._channel.rank))
            present = self._channel.ask(batch, "present", seconds=_PRESENT_S)
            lowest = next((rank for rank in batch if present[rank] is True), None)
            if lowest is not None and self._channel.ask([lowest], "explain", seconds=_ANSWER_S)[lowest] is True:
                return
            silent.update({rank: answer for rank, answer in present.items() if answer is not True})
            first, count = first + count, count * 4
        self._explain(silent)

    def _explain(self, silent: Mapping[int, Silence]) -> None:
        """Ask all ranks, except those that are known not to answer, and tell what is the matter."""
        answers = {**silent, **self._ask(rank for rank in range(len(self._channel.processes)) if rank not in silent)}
        processes = self._processes_of(answers)
        # On a busy machine or network an answer takes its time. Who may give one is asked again; and so are the others,
        # because answers of one moment belong together.
        late = [rank for rank, answer in answers.items() if isinstance(answer, Silence)]
        if any(processes.get(rank, "?") not in ("", "Z", "T", "t") for rank in late):
            answers = {**answers, **self._ask(answers, _PATIENT_S)}
        self._explained = time.monotonic()
        ranks = {
            rank: Rank(silence=answer, process=processes.get(rank))
            if isinstance(answer, Silence)
            else Rank(waits=answer["waits"], at=answer["at"], is_in_package=answer["is_in_package"])
            for rank, answer in answers.items()
        }
        verdict = judge(ranks, self._channel.processes, self._patience)
        if verdict is None or self._is_told(verdict):
            return
        self._told.append(verdict)
        _core.log(LogLevel.WARNING, verdict.text)
        if self._file:
            self._write(verdict, answers)

    def _ask(self, ranks: Iterable[int], seconds: float = _ANSWER_S) -> Mapping[int, Any]:
        return self._channel.ask(ranks, "waits", self._channel.rank, seconds)

    def _is_told(self, verdict: Verdict) -> bool:
        """Whether the same cause has been told of these stalls, of which some may have ended since."""
        self._told = [told for told in self._told if told.stalled & verdict.stalled]
        return any(told.cause == verdict.cause for told in self._told)

    def _processes_of(self, answers: Mapping[int, Any]) -> dict[int, str]:
        """The states of processes that do not answer, as other ranks on their hosts see them."""
        processes = self._channel.processes
        silent = [rank for rank, answer in answers.items() if isinstance(answer, Silence)]
        states: dict[int, str] = {}
        places = [(process.host, process.namespace) for process in processes]
        for place in {places[rank] for rank in silent}:
            here = [rank for rank in silent if places[rank] == place]
            neighbour = next(
                (rank for rank, answer in answers.items() if places[rank] == place and not isinstance(answer, Silence)),
                None,
            )
            if neighbour is None:
                continue
            pids = [processes[rank].pid for rank in here]
            seen = self._channel.ask([neighbour], "processes", pids, _ANSWER_S)[neighbour]
            if not isinstance(seen, Silence):
                states.update({rank: seen[str(processes[rank].pid)] for rank in here})
        return states

    def _write(self, verdict: Verdict, answers: Mapping[int, Any]) -> None:
        """Append to the file what was told, and where each rank is."""
        text = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {verdict.text}\n"
        for rank, answer in answers.items():
            process = self._channel.processes[rank]
            text += f"rank {rank}, {process.host}, process {process.pid}: "
            if isinstance(answer, Silence):
                text += f"{answer.value}\n"
                continue
            text += "its main thread, innermost first:\n" + "".join(f"    {line}\n" for line in answer["stack"])
        try:
            with Path(self._file).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            _core.log(LogLevel.WARNING, f"the verdict cannot be written to {self._file}: {error.strerror}")


def _process_state(pid: int) -> str:
    """Its letter in /proc; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
