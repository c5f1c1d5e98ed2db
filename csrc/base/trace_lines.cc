#include "base/trace_lines.h"

#include <cstdio>
#include <string_view>

namespace collective {
namespace {

using Clock = Timeline::Clock;

constexpr int kLanes = 1000;  // the threads' numbers of a phase begin at a multiple of it

void append_quoted(std::string& text, std::string_view value) {
  text += '"';
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      text += escaped;
    } else {
      text += c;
    }
  }
  text += '"';
}

// Microseconds, with three decimals.
void append_time(std::string& text, Clock::duration duration) {
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
  char number[32];
  std::snprintf(number, sizeof number, "%lld.%03d", static_cast<long long>(ns / 1000), static_cast<int>(ns % 1000));
  text += number;
}

const char* name_of(Timeline::Event::Phase phase) {
  switch (phase) {
    case Timeline::Event::Phase::kWait: return "wait";
    case Timeline::Event::Phase::kRun: return "run";
    case Timeline::Event::Phase::kStep: return "step";
  }
  return "";
}

}  // namespace

int TraceLines::thread(Phase phase, Clock::time_point begin, Clock::time_point end, std::string& text) {
  std::vector<Clock::time_point>& ends = ends_[static_cast<size_t>(phase)];
  size_t lane = 0;
  while (lane < ends.size() && ends[lane] > begin) ++lane;
  const int order = phase == Phase::kStep ? 1 : phase == Phase::kWait ? 2 : 3;
  const int thread = order * kLanes + static_cast<int>(lane);
  if (lane < ends.size()) {
    ends[lane] = end;
    return thread;
  }
  ends.push_back(end);
  const std::string where = ",\"ph\":\"M\",\"pid\":" + std::to_string(rank_ + 1) + ",\"tid\":" + std::to_string(thread);
  text += "{\"name\":\"thread_name\"" + where + ",\"args\":{\"name\":\"" + name_of(phase) +
          (lane == 0 ? std::string() : std::to_string(lane + 1).insert(0, 1, ' ')) + "\"}},\n";
  text += "{\"name\":\"thread_sort_index\"" + where + ",\"args\":{\"sort_index\":" + std::to_string(thread) + "}},\n";
  return thread;
}

std::pair<std::string, size_t> TraceLines::lines(const Timeline::Events& events, size_t room) {
  std::string text, line;
  size_t written = 0;
  for (const Timeline::Event& event : events) {
    if (event.phase == Phase::kRun && event.part > 0) {  // they run as one
      ++written;
      continue;
    }
    line.clear();
    const int on = thread(event.phase, event.begin, event.end, line);
    line += "{\"name\":";
    if (event.phase == Phase::kStep)
      append_quoted(line, std::to_string(event.number).insert(0, "step "));
    else
      append_quoted(line, event.name);
    line += ",\"cat\":\"";
    line += name_of(event.phase);
    line += "\",\"ph\":\"X\",\"pid\":" + std::to_string(rank_ + 1) + ",\"tid\":" + std::to_string(on) + ",\"ts\":";
    append_time(line, event.begin.time_since_epoch());
    line += ",\"dur\":";
    append_time(line, event.end - event.begin);
    line += ",\"args\":{\"kind\":\"";
    line += event.kind;
    line += "\",\"number\":" + std::to_string(event.number);
    if (event.phase != Phase::kStep) line += ",\"bytes\":" + std::to_string(event.nbytes);
    if (event.parts > 1) line += ",\"tensors\":" + std::to_string(event.parts);
    if (!event.group.empty()) {
      line += ",\"group\":";
      append_quoted(line, std::string_view(event.group).substr(0, event.group.rfind(": ")));
    }
    line += "}},\n";
    if (text.size() + line.size() > room) break;
    text += line;
    ++written;
  }
  return {std::move(text), events.size() - written};
}

}  // namespace collective
