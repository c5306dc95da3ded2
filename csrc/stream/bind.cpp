// headstart._stream: the streamer for Python. While a caller waits, the GIL is released, and signals are handled.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "streamer.h"

namespace py = pybind11;
using namespace headstart::stream;

namespace {

using PyExtent = std::tuple<int, int64_t, int64_t, int64_t>;
using PyLayer = std::pair<std::string, std::vector<PyExtent>>;

Source source_named(const std::string& name) {
  if (name == "auto") return Source::kAuto;
  if (name == "direct") return Source::kDirect;
  if (name == "cached") return Source::kCached;
  throw std::invalid_argument("Streamer: source: expected 'auto', 'direct' or 'cached', got '" + name + "'");
}

// Runs Python's signal handlers, such as the one of Ctrl-C. Returns whether one of them raised an exception, which then
// goes to the caller.
bool signalled() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

class PyStreamer {
 public:
  PyStreamer(const std::vector<std::string>& files, const std::vector<PyLayer>& layers,
             const std::vector<py::buffer>& buffers, std::vector<int> schedule, int threads, int64_t block,
             const std::string& source, double bytes_per_second) {
    std::vector<Layer> wanted;
    for (const auto& [name, extents] : layers) {
      Layer layer{name, {}};
      for (const auto& [file, begin, end, position] : extents) layer.extents.push_back({file, begin, end, position});
      wanted.push_back(std::move(layer));
    }
    std::vector<Buffer> memory;
    for (const py::buffer& buffer : buffers) {
      exports_.push_back(buffer.request(/*writable=*/true));
      memory.push_back({static_cast<char*>(exports_.back().ptr), exports_.back().size * exports_.back().itemsize});
    }
    const Options options{threads, block, source_named(source), bytes_per_second};
    streamer_ = std::make_unique<Streamer>(files, std::move(wanted), std::move(schedule), std::move(memory), options);
  }

  ~PyStreamer() {
    if (!streamer_->in_own_process()) {
      streamer_.release();
      return;
    }
    const py::gil_scoped_release released;
    streamer_.reset();
  }

  int acquire(int layer) {
    const py::gil_scoped_release released;
    return streamer_->acquire(layer, signalled);
  }

  void close() {
    const py::gil_scoped_release released;
    streamer_->close();
  }

  py::dict statistics() const {
    const Statistics s = streamer_->statistics();
    py::dict out;
    out["cached"] = s.cached;
    out["direct"] = s.direct;
    out["buffered"] = s.buffered;
    out["layers"] = s.layers;
    out["mispredicted"] = s.mispredicted;
    out["dropped"] = s.dropped;
    out["reading"] = s.reading;
    out["waiting"] = s.waiting;
    return out;
  }

  py::list take_events() {
    static const char* const kNames[] = {"read", "wait", "hold"};
    py::list out;
    for (const Event& e : streamer_->take_events()) {
      out.append(py::make_tuple(kNames[e.kind], e.layer, e.begin, e.end, e.bytes));
    }
    return out;
  }

  Streamer& streamer() { return *streamer_; }

 private:
  std::vector<py::buffer_info> exports_;  // they keep the buffers' memory in place
  std::unique_ptr<Streamer> streamer_;
};

}  // namespace

PYBIND11_MODULE(_stream, m) {
  m.doc() = "Reads weights from storage ahead of the layers that need them. headstart/stream/ring.py uses it.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Interrupted&) {  // the signal handler has already set the exception
    } catch (const ReadError& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  py::class_<PyStreamer>(m, "Streamer")
      .def(py::init<const std::vector<std::string>&, const std::vector<PyLayer>&, const std::vector<py::buffer>&,
                    std::vector<int>, int, int64_t, const std::string&, double>(),
           py::arg("files"), py::arg("layers"), py::arg("buffers"), py::arg("schedule"), py::kw_only(),
           py::arg("threads") = Options().threads, py::arg("block") = Options().block, py::arg("source") = "auto",
           py::arg("bytes_per_second") = 0.0,
           R"(Fills `buffers` with the layers of `schedule`, which repeats without end.

A process that was forked from the one that made the streamer must not use it.

Args:
    files: the paths.
    layers: a name and a list of extents (file, begin, end, position) per layer. Bytes [begin, end) of a file are read
        to `position` of a buffer. begin and position are multiples of 4096.
    buffers: writable memory that starts at a multiple of 4096.
    schedule: indices of layers, in the order of their use.
    threads: the number of reading threads.
    block: the bytes of one read, a multiple of 4096.
    source: "auto" (the page cache if it has the pages, else O_DIRECT), "direct" or "cached".
    bytes_per_second: if positive, reads are not faster than this.

Raises:
    OSError: a file cannot be opened.
    ValueError: an argument is invalid or does not fit the others.)")
      .def(
          "start", [](PyStreamer& s) { s.streamer().start(); }, "Starts to read ahead.")
      .def("acquire", &PyStreamer::acquire, py::arg("layer"),
           "Waits until a layer is read, and returns the index of the buffer that holds it until release. Raises an "
           "OSError that names the file and the layer if it cannot be read.")
      .def(
          "ready", [](PyStreamer& s, int layer) { return s.streamer().ready(layer); }, py::arg("layer"),
          "Whether acquire of the layer would return or raise without waiting.")
      .def(
          "release", [](PyStreamer& s, int slot) { s.streamer().release(slot); }, py::arg("slot"))
      .def("close", &PyStreamer::close, "Ends the reading threads.")
      .def("statistics", &PyStreamer::statistics,
           "Bytes by how they were read, counts of layers, and seconds of reading and of waiting.")
      .def("take_events", &PyStreamer::take_events,
           "Returns the events (kind, layer, begin, end, bytes) since the last call. kind is read, wait or hold. begin "
           "and end are seconds on the clock of time.perf_counter.");
}
