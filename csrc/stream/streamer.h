// Weights from storage into memory, ahead of the layers that want them.
//
//   storage   |layer 0 |layer 1 |layer 2 |layer 3 |layer 4 ...          read in the order of the schedule, in blocks of
//             `---v----'---v----'---v----'                              some MiB, several in flight
//   ring           [slot 0] [slot 1] [slot 2]                           page-aligned buffers that the caller owns
//   compute                 |layer 0| |layer 1| ...                     acquire(layer) -> slot; release(slot)
//
// A slot that is released is at once filled with the next layer of the schedule, which goes round: while a token's last
// layers compute, the next token's first ones are read. Whoever acquires another layer than the next gets it, too: what
// was read ahead for nothing is dropped, and the schedule goes on from there.
//
// A byte of storage is read once a token and waits for no byte of another layer, so the floor of a token's time is its
// bytes over the storage's sequential rate. Pages that the kernel already has in its cache are copied from there; the
// others are read past it (O_DIRECT) where the file system can, so that streaming fills no cache that others could use.
//
// Knows neither Python nor torch. Every function may be called from any thread.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace headstart::stream {

constexpr int64_t kPage = 4096;

// Bytes [begin, end) of a file, which come to lie at `position` of a slot; begin and position are multiples of kPage.
// Up to the next multiple of kPage after them, the slot is written to as well.
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
  kAuto,    // the page cache where it has the pages, else O_DIRECT where the file system can, else plain reads
  kDirect,  // O_DIRECT where the file system can: as if no page were cached
  kCached,  // plain reads, which leave the pages in the cache
};

struct Options {
  int threads = 4;
  int64_t block = 4 << 20;  // bytes of one read; a multiple of kPage
  Source source = Source::kAuto;
  double bytes_per_second = 0;  // no faster than this, if it is positive
};

// What happened, in seconds of the monotonic clock.
struct Event {
  enum Kind { kRead, kWait, kHold } kind;  // a slot was filled; a caller waited for a layer; a caller had it
  int layer;
  double begin, end;
  int64_t bytes;
};

struct Statistics {
  int64_t cached = 0, direct = 0, buffered = 0;  // bytes, by how they were read
  int64_t layers = 0;                            // acquired
  int64_t mispredicted = 0;                      // acquired, and not next in the schedule
  int64_t dropped = 0;                           // layers that were read, wholly or in part, for nothing
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
  // Reads nothing before the first `start` or `acquire`. Throws ReadError for a file that cannot be opened and
  // std::invalid_argument for what does not fit together. The buffers must outlive the streamer.
  Streamer(const std::vector<std::string>& files, std::vector<Layer> layers, std::vector<int> schedule,
           std::vector<Buffer> buffers, const Options& options);
  ~Streamer();
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;

  // Begins to read the schedule, from its start.
  void start();

  // Waits until a layer is read, and returns the slot that holds it until `release`. `interrupted` is asked every few
  // milliseconds of waiting. Throws ReadError (a later call tries again), Interrupted, and std::runtime_error when
  // every slot is held, after `close`, and in a process that was forked from the one that made the streamer.
  int acquire(int layer, const std::function<bool()>& interrupted);

  // Whether `acquire` of the layer would return, or throw, at once.
  bool ready(int layer) const;

  // Throws std::invalid_argument for a slot that is not held.
  void release(int slot);

  // Ends the reading threads; waiting callers get an exception. May be called again.
  void close();

  Statistics statistics() const;

  // The events since the last call; the oldest are forgotten when there are many.
  std::vector<Event> take_events();

  // Whether this is the process that made it. In another one it must not be destroyed: its threads are not there, and
  // its locks may be held for ever.
  bool in_own_process() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace headstart::stream
