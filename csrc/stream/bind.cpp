// headstart._stream: the streamer for Python. Waiting releases the GIL, and wakes for signals.

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

// Runs a handler of Python's, such as Ctrl-C's; what it raises goes on to the caller.
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
  std::vector<py::buffer_info> exports_;  // the memory stays where it is as long as these are held
  std::unique_ptr<Streamer> streamer_;
};

}  // namespace

PYBIND11_MODULE(_stream, m) {
  m.doc() = "Reads weights from storage ahead of the layers that want them; headstart/stream/ring.py is how to use it.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const Interrupted&) {  // the handler of the signal has set the exception
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
           R"(Fills `buffers` with the layers of `schedule`, round and round.

files: paths. layers: of each a name and its extents (file, begin, end, position): bytes [begin, end) of a file come to
lie at `position` of a buffer; begin and position are multiples of 4096. buffers: writable, from a multiple of 4096.
source: "auto" (the page cache where it has the pages, else O_DIRECT), "direct" or "cached". bytes_per_second: no faster
than this, if it is positive. Not to be used in a process that was forked after it was made.)")
      .def(
          "start", [](PyStreamer& s) { s.streamer().start(); }, "Begins to read ahead.")
      .def("acquire", &PyStreamer::acquire, py::arg("layer"),
           "The buffer that holds a layer, once it is read. OSError names the layer and the file that could not be "
           "read.")
      .def(
          "ready", [](PyStreamer& s, int layer) { return s.streamer().ready(layer); }, py::arg("layer"),
          "Whether acquire would not wait.")
      .def(
          "release", [](PyStreamer& s, int slot) { s.streamer().release(slot); }, py::arg("slot"))
      .def("close", &PyStreamer::close, "Ends the reading threads.")
      .def("statistics", &PyStreamer::statistics,
           "Bytes by how they were read, counts of layers, and seconds of reading and of waiting.")
      .def("take_events", &PyStreamer::take_events,
           "(kind, layer, begin, end, bytes) since the last call: kind is read, wait or hold; seconds as "
           "perf_counter's.");
}
