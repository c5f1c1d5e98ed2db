// What a Timeline has recorded as lines of Chrome's JSON, one event each, for a trace of all ranks.
//
// The rank is a process, and its threads are lanes: one of steps, some of waits, some of runs. Slices of a thread must
// not overlap, but operations do, so each goes to the first lane that is free. They come in the order of their ends: a
// lane is free for one that began after the lane's last one had ended.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/timeline.h"

namespace collective {

class TraceLines {
 public:
  explicit TraceLines(int rank) : rank_(rank) {}

  // Lines that end in ",\n", of as many of the events as need at most `room` bytes; and how many of them are left out.
  // Times are microseconds of the clock that std::chrono::steady_clock and Python's time.monotonic() read.
  std::pair<std::string, size_t> lines(const Timeline::Events& events, size_t room);

 private:
  using Phase = Timeline::Event::Phase;
  // The thread of a slice, which is named when it is first used.
  int thread(Phase phase, Timeline::Clock::time_point begin, Timeline::Clock::time_point end, std::string& text);

  int rank_;
  std::vector<Timeline::Clock::time_point> ends_[3];  // of the last slice of each lane, by phase
};

}  // namespace collective
