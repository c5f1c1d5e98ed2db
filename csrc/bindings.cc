// collective._core: the engine for Python. Takes addresses, counts, types and names; never sees an array or a
// framework.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <type_traits>

#include "base/log.h"
#include "base/rank_names.h"
#include "base/thresholds.h"
#include "base/trace_lines.h"
#include "device/device_kernels.h"
#include "engine/bucket.h"
#include "engine/engine.h"
#include "messages/meeting.h"
#include "messages/mpi_library.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace collective {
namespace {

template <typename Handle>
Handle comm_from(uintptr_t handle) {
  if constexpr (std::is_pointer_v<Handle>)
    return reinterpret_cast<Handle>(handle);  // Open MPI
  else
    return static_cast<Handle>(handle);  // MPICH
}

Descriptor describe(Kind kind, std::vector<int64_t> shape, DType dtype, DType wire, ReduceOp op, double prescale,
                    double postscale, int root, std::string device, std::string layout) {
  Descriptor d;
  d.kind = kind;
  d.dtype = dtype;
  d.wire = wire;
  d.op = op;
  d.prescale = prescale;
  d.postscale = postscale;
  d.root = root;
  d.device = std::move(device);
  d.layout = std::move(layout);
  d.shape = std::move(shape);
  return d;
}

// What is queued on the stream of an array's device; null for the host's arrays.
std::shared_ptr<DeviceMark> mark_of(int device, uintptr_t stream) {
  if (device < 0) return nullptr;
  // The driver's call may block, on a full queue or on a callback into Python.
  std::optional<py::gil_scoped_release> nogil;
  if (PyGILState_Check() != 0) nogil.emplace();
  return Device::get(device).mark(stream);
}

std::shared_ptr<Ticket> submit(Engine& engine, size_t group, const std::string& name, Descriptor descriptor,
                               uintptr_t source, uintptr_t target, std::vector<int64_t> splits, bool recurring,
                               bool caller_waits, int device, uintptr_t stream) {
  int64_t rows = 0;
  const size_t count = descriptor.count();
  if (rows_differ(descriptor.kind)) rows = std::exchange(descriptor.shape.at(0), -1);
  return engine.submit(group, name,
                       NamedSubmission{std::move(descriptor),
                                       {reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target), count},
                                       rows,
                                       std::move(splits),
                                       recurring,
                                       mark_of(device, stream)},
                       caller_waits);
}

std::shared_ptr<Ticket> submit_ordered(Engine& engine, size_t group, const std::string& name, Descriptor descriptor,
                                       uintptr_t source, uintptr_t target, std::vector<int64_t> splits,
                                       std::vector<int64_t> rows, std::vector<int64_t> expected, bool caller_waits,
                                       int device, uintptr_t stream) {
  int64_t own_rows = 0;
  const size_t count = descriptor.count();
  if (rows_differ(descriptor.kind)) own_rows = std::exchange(descriptor.shape.at(0), -1);
  return engine.submit(
      group, name,
      OrderedSubmission{{std::move(descriptor),
                         {reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target), count},
                         own_rows,
                         std::move(splits),
                         false,
                         mark_of(device, stream)},
                        std::move(rows),
                        std::move(expected)},
      caller_waits);
}

// What Engine::waits() gives, as JSON has it.
py::object waits(Engine& engine, double patience) {
  const auto looked = [&] {
    const py::gil_scoped_release release;
    return engine.waits(std::chrono::milliseconds(static_cast<int>(patience * 1000)));
  }();
  if (!looked) return py::none();
  const auto now = Clock::now();
  py::list groups;
  for (const GroupWaits& group : looked->groups) {
    py::list in_flight;
    for (const InFlight& one : group.in_flight) {
      const char* const phases[] = {"not ready", "submitted", "agreed", "runs"};
      in_flight.append(py::dict("key"_a = one.key, "what"_a = one.what, "state"_a = one.state,
                                "phase"_a = phases[static_cast<int>(one.phase)],
                                "seconds"_a = std::chrono::duration<double>(now - one.since).count(),
                                "bucket"_a = one.bucket, "run"_a = one.run, "peer"_a = one.peer));
    }
    groups.append(py::dict("label"_a = group.label, "identity"_a = group.identity, "ranks"_a = group.ranks,
                           "started"_a = group.started, "turns"_a = group.turns, "joined"_a = group.has_joined,
                           "leaving"_a = group.is_leaving, "in_flight"_a = in_flight));
  }
  return py::dict("waited_for"_a = looked->is_waited_for, "shut_down"_a = looked->is_shut_down, "groups"_a = groups);
}

// Kept as it is until somebody reads it.
struct Recorded {
  Timeline::Events events;
};

template <typename T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> result;
  result.reserve(addresses.size());
  for (const uintptr_t address : addresses) result.push_back(reinterpret_cast<T*>(address));
  return result;
}

// The bytes of an allgather's result as an array that owns them.
py::array_t<uint8_t> take_output(Ticket& ticket, size_t nbytes) {
  if (nbytes == 0) return py::array_t<uint8_t>(0);
  if (nbytes > ticket.output.nbytes()) throw Error(ErrorCode::kInternal, "a result is shorter than its caller expects");
  std::byte* data = ticket.output.release();
  const py::capsule owner(data, [](void* p) { std::free(p); });
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(nbytes), reinterpret_cast<uint8_t*>(data), owner);
}

// What a tensor's place in a bucket belongs to: it lives as long as this or the bucket.
py::capsule owner_of(const Bucket& bucket, size_t i) {
  auto place = std::make_unique<std::shared_ptr<std::byte>>(bucket.place(i));
  py::capsule owner(place.get(), [](void* p) { delete static_cast<std::shared_ptr<std::byte>*>(p); });
  place.release();  // the capsule's now
  return owner;
}

// The bytes of the place.
py::array_t<uint8_t> place_of(const Bucket& bucket, size_t i) {
  auto* const data = reinterpret_cast<uint8_t*>(bucket.place(i).get());
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(bucket.place_nbytes(i)), data, owner_of(bucket, i));
}

// Its address, its bytes and its owner, where it is on a device.
py::tuple device_place_of(const Bucket& bucket, size_t i) {
  return py::make_tuple(reinterpret_cast<uintptr_t>(bucket.place(i).get()), bucket.place_nbytes(i),
                        owner_of(bucket, i));
}

// (label, ranks of the group, seconds, [(series, name, operations, [(rank, host, times last of those recorded, of
// all, seconds, operation)])])
py::tuple as_tuple(const LedgerPage& page) {
  py::list parts;
  for (const LedgerPage::Part& part : page.parts) {
    py::list entries;
    for (const LedgerPage::Entry& entry : part.entries)
      entries.append(
          py::make_tuple(entry.rank, host_of(entry.rank), entry.seen, entry.last, entry.cost, entry.longest));
    parts.append(py::make_tuple(part.series, part.name, part.count, entries));
  }
  return py::make_tuple(page.label, page.size, page.elapsed, parts);
}

// What Engine::ledgers() gives.
py::object ledgers(Engine& engine, double patience) {
  const auto pages = [&] {
    const py::gil_scoped_release release;
    return engine.ledgers(std::chrono::milliseconds(static_cast<int>(patience * 1000)));
  }();
  if (!pages) return py::none();
  py::list result;
  for (const LedgerPage& page : *pages) result.append(as_tuple(page));
  return result;
}

}  // namespace
}  // namespace collective

PYBIND11_MODULE(_core, m) {
  using namespace collective;

  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Error& error) {
      const py::object type =
          py::module_::import("collective.errors").attr("error_class")(static_cast<int>(error.code));
      PyErr_SetString(type.ptr(), error.what());
    }
  });

  py::enum_<Kind>(m, "Kind")
      .value("allreduce", Kind::kAllreduce)
      .value("broadcast", Kind::kBroadcast)
      .value("allgather", Kind::kAllgather)
      .value("barrier", Kind::kBarrier)
      .value("alltoall", Kind::kAlltoall)
      .value("reducescatter", Kind::kReduceScatter)
      .value("gather", Kind::kGather)
      .value("scatter", Kind::kScatter)
      .value("reduce", Kind::kReduce)
      .value("refusal", Kind::kRefusal)
      .value("pair", Kind::kPair);
  py::enum_<DType> dtype(m, "DType");
  for (int i = 0; i < kDTypeCount; ++i) dtype.value(name_of(static_cast<DType>(i)), static_cast<DType>(i));
  py::enum_<ReduceOp> op(m, "ReduceOp");
  for (int i = 0; i <= static_cast<int>(ReduceOp::kBitXor); ++i)
    op.value(name_of(static_cast<ReduceOp>(i)), static_cast<ReduceOp>(i));

  py::class_<Descriptor>(m, "Descriptor")
      .def(py::init(&describe), py::arg("kind"), py::arg("shape"), py::arg("dtype"), py::arg("wire"), py::arg("op"),
           py::arg("prescale"), py::arg("postscale"), py::arg("root"), py::arg("device"), py::arg("layout"))
      .def(
          "called_from",
          [](Descriptor d, std::string site) {
            d.site = std::move(site);
            return d;
          },
          py::arg("site"));

  py::class_<Ticket, std::shared_ptr<Ticket>>(m, "Ticket")
      .def_property_readonly("done", &Ticket::finished)
      .def_property_readonly("name", [](const Ticket& t) { return t.name; })
      .def_property_readonly("code", [](const Ticket& t) { return static_cast<int>(t.code); })
      .def_property_readonly("text", [](const Ticket& t) { return t.text; })
      .def_property_readonly("ledger", [](const Ticket& t) { return as_tuple(LedgerPage::decode(t.text)); })
      .def_property_readonly("given_up", [](const Ticket& t) { return t.given_up; })
      .def_property_readonly("rows", [](const Ticket& t) { return t.rows; })
      .def("take_output", &take_output, py::arg("nbytes"));

  py::class_<Topology>(m, "Topology")
      .def_readonly("rank", &Topology::rank)
      .def_readonly("size", &Topology::size)
      .def_readonly("local_rank", &Topology::local_rank)
      .def_readonly("local_size", &Topology::local_size)
      .def_readonly("cross_rank", &Topology::cross_rank)
      .def_readonly("cross_size", &Topology::cross_size)
      .def_readonly("homogeneous", &Topology::homogeneous);

  py::class_<Recorded>(m, "Recorded").def("operations", [](const Recorded& recorded) {
    const auto ns = [](Timeline::Clock::duration t) { return std::chrono::nanoseconds(t).count(); };
    py::list result;
    for (const auto& e : recorded.events)
      if (e.phase != Timeline::Event::Phase::kStep)
        result.append(py::make_tuple(e.name, e.kind, e.phase == Timeline::Event::Phase::kRun,
                                     ns(e.begin.time_since_epoch()), ns(e.end.time_since_epoch())));
    return result;
  });
  py::class_<TraceLines>(m, "TraceLines")
      .def(py::init<int>(), py::arg("rank"))
      .def(
          "lines",
          [](TraceLines& self, const Recorded& recorded, size_t room) {
            std::pair<std::string, size_t> found;
            {
              const py::gil_scoped_release nogil;
              found = self.lines(recorded.events, room);
            }
            return std::pair(py::bytes(found.first), found.second);
          },
          py::arg("recorded"), py::arg("room"));
  py::class_<Statistics::InFlight>(m, "InFlight")
      .def_readonly("name", &Statistics::InFlight::name)
      .def_readonly("kind", &Statistics::InFlight::kind)
      .def_readonly("seconds", &Statistics::InFlight::seconds);
  py::class_<Statistics>(m, "Statistics")
      .def_readonly("seconds", &Statistics::seconds)
      // (Operations, bytes) by kind.
      .def_property_readonly("finished",
                             [](const Statistics& s) {
                               std::map<std::string, std::pair<uint64_t, uint64_t>> all;
                               for (const auto& [kind, of] : s.finished) all[kind] = {of.operations, of.bytes};
                               return all;
                             })
      .def_readonly("failed", &Statistics::failed)
      .def_readonly("in_flight", &Statistics::in_flight)
      .def_readonly("in_flight_seconds", &Statistics::in_flight_seconds)
      .def_readonly("waited_seconds", &Statistics::waited_seconds)
      .def_readonly("oldest", &Statistics::oldest)
      .def_readonly("state", &Statistics::state);

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](uintptr_t comm, size_t fusion_threshold, double stall_warning, double timeout,
                       bool shared_memory, bool nccl, const std::vector<int>& cores) {
             using Seconds = std::chrono::duration<double>;
             const py::gil_scoped_release nogil;
             return std::make_shared<Engine>(
                 comm_from<MPI_Comm>(comm),
                 Limits{fusion_threshold, Seconds(stall_warning), Seconds(timeout), shared_memory, nccl}, cores);
           }),
           py::arg("comm"), py::arg("fusion_threshold"), py::arg("stall_warning"), py::arg("timeout"),
           py::arg("shared_memory"), py::arg("nccl"), py::arg("cores"))
      .def_property_readonly("topology", &Engine::topology)
      .def("device_way", &Engine::device_way, py::call_guard<py::gil_scoped_release>())
      .def("shares_memory", &Engine::shares_memory, py::call_guard<py::gil_scoped_release>())
      .def("submit", &submit, py::arg("group"), py::arg("name"), py::arg("descriptor"), py::arg("source"),
           py::arg("target"), py::arg("splits"), py::arg("recurring"), py::arg("caller_waits"), py::arg("device") = -1,
           py::arg("stream") = 0)
      .def("submit_ordered", &submit_ordered, py::arg("group"), py::arg("name"), py::arg("descriptor"),
           py::arg("source"), py::arg("target"), py::arg("splits"), py::arg("rows"), py::arg("expected"),
           py::arg("caller_waits"), py::arg("device") = -1, py::arg("stream") = 0)
      .def("report", &Engine::report, py::arg("ticket"), py::call_guard<py::gil_scoped_release>())
      .def("take_finished", &Engine::take_finished, py::call_guard<py::gil_scoped_release>())
      .def(
          "submit_pair",
          [](Engine& engine, size_t group, const std::string& name, Descriptor descriptor, bool sends, int peer,
             int tag, uintptr_t data, bool caller_waits, int device, uintptr_t stream) {
            return engine.submit(group, name,
                                 PairSubmission{sends, peer, tag, std::move(descriptor), reinterpret_cast<void*>(data),
                                                mark_of(device, stream)},
                                 caller_waits);
          },
          py::arg("group"), py::arg("name"), py::arg("descriptor"), py::arg("sends"), py::arg("peer"), py::arg("tag"),
          py::arg("data"), py::arg("caller_waits"), py::arg("device") = -1, py::arg("stream") = 0)
      .def(
          "submit_join",
          [](Engine& engine, size_t group, const std::string& name,
             const std::vector<std::pair<int, uintptr_t>>& streams) {
            JoinSubmission submission;
            for (const auto& [device, stream] : streams) submission.marks.push_back(mark_of(device, stream));
            return engine.submit(group, name, std::move(submission), true);
          },
          py::arg("group"), py::arg("name"), py::arg("streams"))
      .def(
          "add_group", [](Engine& engine, uintptr_t comm) { return engine.add_group(comm_from<MPI_Comm>(comm)); },
          py::arg("comm"), py::call_guard<py::gil_scoped_release>())
      .def(
          "add_ordered_group",
          [](Engine& engine, uintptr_t comm, const std::string& label, const std::string& identity, double timeout) {
            const std::chrono::duration<double> seconds(timeout);
            return engine.add_group(comm_from<MPI_Comm>(comm), {true, label, identity, seconds});
          },
          py::arg("comm"), py::arg("label"), py::arg("identity"), py::arg("timeout"),
          py::call_guard<py::gil_scoped_release>())
      .def("remove_group", &Engine::remove_group, py::arg("group"), py::call_guard<py::gil_scoped_release>())
      .def("dismiss_group", &Engine::dismiss_group, py::arg("group"), py::call_guard<py::gil_scoped_release>())
      .def("wait", &Engine::wait, py::arg("ticket"), py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def(
          "wait_for_question", [](Engine& engine) { return engine.whereabouts().wait_for_question(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "tell_where", [](Engine& engine, std::string text) { engine.whereabouts().tell(std::move(text)); },
          py::arg("text"))
      .def("report_stalls", [](Engine& engine) { engine.report_stalls(); })
      .def(
          "take_stall", [](Engine& engine) { return engine.stall_reports().take(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "put_stall", [](Engine& engine, std::string text) { engine.stall_reports().put(std::move(text)); },
          py::arg("text"))
      .def("waits", &waits, py::arg("patience"))
      .def("waited",
           [](const Engine& engine) {
             const WaitTotals& waits = engine.waited();
             return std::pair(waits.count.load(),
                              std::chrono::duration<double>(std::chrono::nanoseconds(waits.ns)).count());
           })
      .def("ledgers", &ledgers, py::arg("patience"))
      .def("ask_ledgers", &Engine::ask_ledgers, py::call_guard<py::gil_scoped_release>())
      .def("start_timeline", [](Engine& engine) { engine.timeline().start(); })
      .def("stop_timeline", [](Engine& engine) { engine.timeline().stop(); })
      .def(
          "end_step", [](Engine& engine, uint64_t number) { engine.timeline().end_step(number); }, py::arg("number"))
      .def("take_timeline", [](Engine& engine) { return Recorded{engine.timeline().take()}; })
      .def("shutdown", &Engine::shutdown, py::call_guard<py::gil_scoped_release>())
      .def("statistics", &Engine::statistics, py::call_guard<py::gil_scoped_release>())
      .def("describe", &Engine::describe, py::call_guard<py::gil_scoped_release>());

  py::class_<BucketLayout>(m, "BucketLayout")
      .def(py::init([](DType dtype, DType wire, std::vector<size_t> counts, size_t notes, int device) {
             return BucketLayout{dtype, wire, std::move(counts), notes, device};
           }),
           py::arg("dtype"), py::arg("wire"), py::arg("counts"), py::arg("notes"), py::arg("device"));
  py::class_<BucketOpening>(m, "BucketOpening")
      .def_readonly("ticket", &BucketOpening::ticket)
      .def("buckets", &BucketOpening::buckets, py::arg("contents") = std::vector<std::string>(),
           py::call_guard<py::gil_scoped_release>());
  m.def(
      "open_buckets",
      [](std::shared_ptr<Engine> engine, size_t group, const std::string& name, std::vector<BucketLayout> layouts,
         DType dtype, DType wire, ReduceOp op, double prescale, double postscale, std::string described,
         std::string kind, int device, uintptr_t stream) {
        return open_buckets(std::move(engine), group, name, std::move(layouts), {dtype, wire, op, prescale, postscale},
                            std::move(described), std::move(kind), mark_of(device, stream));
      },
      py::arg("engine"), py::arg("group"), py::arg("name"), py::arg("layouts"), py::arg("dtype"), py::arg("wire"),
      py::arg("op"), py::arg("prescale"), py::arg("postscale"), py::arg("described"), py::arg("kind"),
      py::arg("device"), py::arg("stream"));

  py::class_<Bucket, std::shared_ptr<Bucket>>(m, "Bucket")
      .def_property_readonly("name", &Bucket::name)
      .def_property_readonly("dtype", &Bucket::dtype)
      .def_property_readonly("number", &Bucket::number)
      .def_property_readonly("on_device", &Bucket::on_device)
      .def(
          "start",
          [](Bucket& bucket, const std::vector<uintptr_t>& tensors, const std::vector<size_t>& notes, int device,
             uintptr_t stream) { return bucket.start(pointers<const void>(tensors), notes, mark_of(device, stream)); },
          py::arg("tensors"), py::arg("notes"), py::arg("device") = -1, py::arg("stream") = 0,
          py::call_guard<py::gil_scoped_release>())
      .def("place", &place_of, py::arg("tensor"))
      .def("device_place", &device_place_of, py::arg("tensor"))
      .def("present", &Bucket::present)
      .def("noted", &Bucket::noted)
      .def(
          "fetch",
          [](Bucket& bucket, const std::vector<uintptr_t>& targets, int device, uintptr_t stream) {
            if (device < 0)
              bucket.fetch(pointers<void>(targets));
            else
              bucket.fetch(pointers<void>(targets), Device::get(device), stream);
          },
          py::arg("targets"), py::arg("device") = -1, py::arg("stream") = 0, py::call_guard<py::gil_scoped_release>());

  // (The names of the devices and their places in the machine, why there are none.)
  m.def("devices", [] {
    std::string why;
    std::vector<std::pair<std::string, std::string>> found;
    for (int i = 0, count = Device::count(why); i < count; ++i) found.push_back(Device::look_up(i));
    return std::pair(found, why);
  });
  // The kernels by themselves, on a stream of the caller's: for benchmarks.
  m.def(
      "queue_convert",
      [](int number, uintptr_t stream, DType to, DType from,
         const std::vector<std::tuple<uintptr_t, uintptr_t, size_t>>& pieces, double scale) {
        std::vector<Conversion> conversions;
        for (const auto& [source, target, count] : pieces)
          conversions.push_back({reinterpret_cast<const void*>(source), reinterpret_cast<void*>(target), count});
        Device& device = Device::get(number);
        DeviceStream queue(device, stream);
        queue_convert(device, queue, to, from, conversions, scale, ReduceOp::kSum);
      },
      py::arg("device"), py::arg("stream"), py::arg("to"), py::arg("from_"), py::arg("pieces"), py::arg("scale"));
  m.def(
      "queue_reduce",
      [](int number, uintptr_t stream, DType dtype, ReduceOp op, const std::vector<uintptr_t>& sources,
         const std::vector<uintptr_t>& targets, size_t count, double scale) {
        Device& device = Device::get(number);
        DeviceStream queue(device, stream);
        queue_reduce(device, queue, {dtype, op, scale}, pointers<const void>(sources), pointers<void>(targets), count);
      },
      py::arg("device"), py::arg("stream"), py::arg("dtype"), py::arg("op"), py::arg("sources"), py::arg("targets"),
      py::arg("count"), py::arg("scale"));
  m.def("compute_capability", [](int device) { return Device::get(device).compute_capability(); });
  m.def("load_kernels", [](int device, const std::string& image) {
    const py::gil_scoped_release nogil;
    Device::get(device).load_kernels(image, kernel_names());
  });
  m.def("do_without_kernels", [](int device, const std::string& why) { Device::get(device).do_without_kernels(why); });
  m.def("set_messages",
        [](int device, const std::string& why_not) { Device::get(device).set_messages({true, why_not}); });
  m.def("load_nccl", &load_nccl, py::arg("files"), py::call_guard<py::gil_scoped_release>());
  m.def("set_log_level", [](int level) { set_log_level(static_cast<LogLevel>(level)); }, py::arg("level"));
  m.def(
      "log", [](int level, const std::string& text) { log(static_cast<LogLevel>(level), text); }, py::arg("level"),
      py::arg("text"));
  m.def("queue_log_lines", &queue_log_lines, py::arg("on"));
  m.def("wait_for_log_line", &wait_for_log_line, py::call_guard<py::gil_scoped_release>());
  m.def("take_log_line", []() -> py::object {
    const auto line = take_log_line();
    if (!line) return py::none();
    return py::make_tuple(static_cast<int>(line->level), line->text);
  });
  m.attr("PAIR_TAGS") = kPairTags;
  // ndarray.ctypes.data takes ten times as long.
  m.def("address_of", [](const py::array& array) { return reinterpret_cast<uintptr_t>(array.data()); });
  // Keeps the engine for ever: in a forked child its thread does not exist and its destructor must not run.
  m.def("leak", [](const std::shared_ptr<Engine>& engine) { new std::shared_ptr<Engine>(engine); });
  m.def(
      "meet",
      [](uintptr_t comm, double stall_warning, double timeout) {
        using Seconds = std::chrono::duration<double>;
        meet(comm_from<MPI_Comm>(comm), Seconds(stall_warning), Seconds(timeout));
      },
      py::arg("comm"), py::arg("stall_warning"), py::arg("timeout"), py::call_guard<py::gil_scoped_release>());
  m.def("ranks_text", &ranks_text, py::arg("ranks"));
  m.def("set_hosts", &set_hosts, py::arg("hosts"));
  m.def("built_for_mpi", &built_for_mpi);
  m.def("running_mpi", &running_mpi);
  m.def("running_mpi_path", &running_mpi_path);
  // (What, bytes, the way below, the way above.)
  m.def("thresholds", [] {
    std::vector<std::tuple<std::string, size_t, std::string, std::string>> all;
    for (const auto& t : thresholds::kAll) all.emplace_back(t.what, t.bytes, t.below, t.above);
    return all;
  });
  m.def("simd_name", [] { return std::string(simd_name()); });
}
