// Reads weights from storage into memory, ahead of the layers that need them.
//
//   storage   |layer 0 |layer 1 |layer 2 |layer 3 |layer 4 ...          read in the order of the schedule, in blocks of
//             `---v----'---v----'---v----'                              some MiB, several in flight
//   ring           [slot 0] [slot 1] [slot 2]                           page-aligned buffers that the caller owns
//   compute                 |layer 0| |layer 1| ...                     acquire(layer) -> slot; release(slot)
//
// A released slot is immediately filled with the next layer of the schedule. The schedule repeats without end: while
// the last layers of a token compute, the first layers of the next token are read. A caller may also acquire a layer
// that is not the next one. Then the layers that were read ahead in vain are dropped, and the schedule continues from
// the acquired layer.
//
// Every byte is read from storage once per token and does not wait for bytes of another layer. So the floor of a
// token's time is its bytes divided by the storage's sequential rate. Pages in the kernel's page cache are copied from
// there. Other pages bypass the cache (O_DIRECT) if the file system supports it, so streaming does not fill a cache
// that others could use.
//
// This file depends on neither Python nor torch. Every function may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace headstart::stream {

constexpr int64_t kPage = 4096;

// Bytes [begin, end) of a file, which are read to `position` of a slot. begin and position are multiples of kPage. The
// slot may be overwritten up to the next multiple of kPage after them.
struct Extent {
  int file;
  int64_t begin, end, position;
};

struct Layer {
  std::string name;
  std::vector<Extent> extents;
};

struct Buffer {
  char* data;
  int64_t bytes;
};

enum class Source {
  kAuto,    // the page cache if it has the pages, else O_DIRECT if the file system supports it, else plain reads
  kDirect,  // O_DIRECT if the file system supports it, as if no page were cached; else plain reads
  kCached,  // plain reads, which leave the pages in the cache
};

struct Options {
  int threads = 4;
  int64_t block = 4 << 20;  // bytes of one read; a multiple of kPage
  Source source = Source::kAuto;
  double bytes_per_second = 0;  // if positive, reads are not faster than this
};

// An event of the streamer. begin and end are seconds of the monotonic clock.
struct Event {
  enum Kind { kRead, kWait, kHold } kind;  // a slot was filled; a caller waited for a layer; a caller held it
  int layer;
  double begin, end;
  int64_t bytes;
};

struct Statistics {
  int64_t cached = 0, direct = 0, buffered = 0;  // bytes by the way they were read: page cache, O_DIRECT, plain reads
  int64_t layers = 0;                            // acquired layers
  int64_t mispredicted = 0;                      // acquired layers that were not next in the schedule
  int64_t dropped = 0;                           // layers that were read, completely or in part, in vain
  double reading = 0;                            // seconds in which at least one read was in flight
  double waiting = 0;                            // seconds in which a caller waited
};

struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

class Streamer {
 public:
  // Reads nothing before the first `start` or `acquire`. The buffers must outlive the streamer. Throws ReadError if a
  // file cannot be opened, and std::invalid_argument if an argument is invalid or does not fit the others.
  Streamer(const std::vector<std::string>& files, std::vector<Layer> layers, std::vector<int> schedule,
           std::vector<Buffer> buffers, const Options& options);
  ~Streamer();
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;

  // Starts to read ahead, from the next layer of the schedule on. At first, this is the schedule's first layer.
  void start();

  // Waits until a layer is read, and returns the slot that holds it until `release`. Calls `interrupted` about every
  // 20 ms while it waits. Throws
  // - ReadError if the layer could not be read; a later call tries again;
  // - Interrupted if `interrupted` returns true;
  // - std::invalid_argument if the layer is not in the schedule;
  // - std::runtime_error if every slot is held, after `close`, and in a process that was forked from the one that made
  //   the streamer.
  int acquire(int layer, const std::function<bool()>& interrupted);

  // Whether `acquire` of the layer would return or throw without waiting.
  bool ready(int layer) const;

  // Throws std::invalid_argument for a slot that is not held.
  void release(int slot);

  // Ends the reading threads. Waiting callers get an exception. Further calls do nothing.
  void close();

  Statistics statistics() const;

  // Returns the events since the last call. Only the newest 65,536 events are kept.
  std::vector<Event> take_events();

  // Whether this process made the streamer. Another process must not destroy it: its threads do not exist there, and
  // its locks may be held for ever.
  bool in_own_process() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headstart::stream
