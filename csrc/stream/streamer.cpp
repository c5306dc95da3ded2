#include "streamer.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

namespace headstart::stream {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxEvents = 1 << 16;
constexpr auto kSignalsEvery = std::chrono::milliseconds(20);

double seconds(Clock::time_point t) { return std::chrono::duration<double>(t.time_since_epoch()).count(); }
double now() { return seconds(Clock::now()); }
int64_t page_up(int64_t x) { return (x + kPage - 1) / kPage * kPage; }

std::string cause(int error) { return std::strerror(error); }

class File {
 public:
  File(const std::string& path, Source source) : path_(path), source_(source) {
    plain_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (plain_ < 0) throw ReadError(path + ": cannot be opened: " + cause(errno));
#ifdef O_DIRECT
    if (source != Source::kCached) direct_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
    struct stat found;
    if (source == Source::kAuto && fstat(plain_, &found) == 0 && found.st_size > 0) {
      mapped_ = found.st_size;
      map_ = mmap(nullptr, mapped_, PROT_READ, MAP_SHARED, plain_, 0);
    }
  }
  ~File() {
    if (map_ != MAP_FAILED) munmap(map_, mapped_);
    if (plain_ >= 0) close(plain_);
    if (direct_ >= 0) close(direct_);
  }
  File(File&& other) noexcept
      : path_(std::move(other.path_)),
        source_(other.source_),
        plain_(other.plain_),
        direct_(other.direct_),
        map_(other.map_),
        mapped_(other.mapped_) {
    other.plain_ = other.direct_ = -1;
    other.map_ = MAP_FAILED;
  }

  // Reads [offset, offset + bytes) to `to`. May read on to the end of the last page, but not further. Returns the text
  // of an error, or "".
  std::string read(char* to, int64_t offset, int64_t bytes, Statistics& counted) const {
    int64_t done = 0;
    if (const int64_t resident = resident_bytes(offset, bytes); resident > 0) {
      counted.cached += done = read_cached(to, offset, resident);
    }
    if (done < bytes && direct_ >= 0) {
      const int64_t before = done;
      done = done / kPage * kPage;
      const std::string error = read_direct(to, offset, bytes, done);
      if (!error.empty()) return error;
      counted.direct += std::max<int64_t>(std::min(done, bytes) - before, 0);
    }
    while (done < bytes) {  // there is no O_DIRECT, or these are the last bytes of the file
      const ssize_t n = pread(plain_, to + done, bytes - done, offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return cause(errno);
      if (n == 0) {
        return "expected " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + ", got " +
               std::to_string(done) + "; the file was cut short";
      }
      done += n;
      counted.buffered += n;
    }
    return "";
  }

  const std::string& path() const { return path_; }

 private:
  // The number of bytes, counted from `offset`, that the page cache holds without a gap. A read with RWF_NOWAIT would
  // tell this, too. But then Linux starts to read the missing pages into the cache, and soon the cache serves
  // everything. For a file that belongs to somebody else and cannot be written, Linux reports that all pages are
  // cached.
  int64_t resident_bytes(int64_t offset, int64_t bytes) const {
    static const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t begin = offset / page * page, end = std::min(offset + bytes, mapped_);
    if (map_ == MAP_FAILED || begin >= end) return 0;
    std::vector<unsigned char> pages((end - begin + page - 1) / page);
    if (mincore(static_cast<char*>(map_) + begin, end - begin, pages.data()) != 0) return 0;
    const auto missing = std::find_if(pages.begin(), pages.end(), [](unsigned char x) { return (x & 1) == 0; });
    return std::min(begin + (missing - pages.begin()) * page, end) - offset;
  }

  // Reads the first bytes that are still in the page cache, without waiting for the storage. Returns their number.
  int64_t read_cached(char* to, int64_t offset, int64_t bytes) const {
#ifdef RWF_NOWAIT
    iovec part{to, static_cast<size_t>(bytes)};
    const ssize_t n = preadv2(plain_, &part, 1, offset, RWF_NOWAIT);
    return std::max<ssize_t>(n, 0);
#else
    return 0;
#endif
  }

  // Reads with O_DIRECT from `done` on, which is a multiple of kPage, and moves `done` to the end of the bytes read.
  // This end is at `bytes` or past it, or it is the place from which plain reads must continue. Returns the text of an
  // error, or "".
  std::string read_direct(char* to, int64_t offset, int64_t bytes, int64_t& done) const {
    while (done < bytes) {
      const ssize_t n = pread(direct_, to + done, page_up(bytes) - done, offset + done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EINVAL || errno == EOPNOTSUPP))
        return "";  // the file system accepts O_DIRECT but cannot do it
      if (n < 0) return cause(errno);
      done += n;
      if (n == 0 || done % kPage != 0) return "";  // the end of the file
    }
    return "";
  }

  std::string path_;
  Source source_;
  int plain_ = -1, direct_ = -1;
  void* map_ = MAP_FAILED;  // used only to find out which pages are in the cache
  int64_t mapped_ = 0;
};

struct Chunk {
  int file;
  int64_t offset, bytes, position;
};

struct Slot {
  enum State { kFree, kAhead, kHeld, kDropped } state = kFree;  // a dropped slot becomes free when its reads have ended
  Buffer buffer;
  int layer = -1;
  size_t issued = 0, in_flight = 0, done = 0;  // numbers of chunks
  double begin = 0;
  std::string error;
};

void block_signals() {  // the threads of the program handle them
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace

struct Streamer::State {
  std::vector<File> files;
  std::vector<Layer> layers;
  std::vector<std::vector<Chunk>> chunks;  // by layer
  std::vector<int64_t> bytes;              // by layer
  std::vector<int> schedule;
  Options options;
  pid_t pid = getpid();

  std::mutex mutex;                      // protects all members below
  std::condition_variable work, filled;  // work wakes the reading threads, filled wakes the callers
  bool taken = false;                    // a caller waits for a layer or ends the threads; callers take turns
  std::vector<Slot> slots;
  std::deque<int> ahead;  // slots being filled or full, in the order of the schedule
  size_t next = 0;        // the place in the schedule of the next layer to read
  bool started = false, stopping = false;
  size_t reads = 0;  // the number of reads in flight
  double reading_since = 0;
  Clock::time_point store_free{};  // when a storage of `bytes_per_second` would have finished all reads so far
  Statistics counted;
  std::deque<Event> events;
  std::vector<std::thread> threads;

  void record(const Event& event) {
    if (events.size() == kMaxEvents) events.pop_front();
    events.push_back(event);
  }

  bool whole(const Slot& slot) const { return slot.done == chunks[slot.layer].size(); }

  // The slot whose next chunk is to be read, or null. If all chunks of the slots ahead are issued, it takes a free slot
  // for the next layer.
  Slot* next_work() {
    for (int i : ahead) {
      if (slots[i].error.empty() && slots[i].issued < chunks[slots[i].layer].size()) return &slots[i];
    }
    const auto free = std::find_if(slots.begin(), slots.end(), [](const Slot& s) { return s.state == Slot::kFree; });
    if (!started || free == slots.end()) return nullptr;
    free->state = Slot::kAhead;
    free->layer = schedule[next];
    free->issued = free->done = 0;
    free->error.clear();
    next = (next + 1) % schedule.size();
    ahead.push_back(static_cast<int>(free - slots.begin()));
    return &*free;
  }

  void read_ahead() {
    block_signals();
    std::unique_lock<std::mutex> lock(mutex);
    while (!stopping) {
      Slot* slot = next_work();
      if (slot == nullptr) {
        work.wait(lock);
        continue;
      }
      if (slot->issued == 0) slot->begin = now();
      const Chunk& chunk = chunks[slot->layer][slot->issued++];
      ++slot->in_flight;
      if (reads++ == 0) reading_since = now();
      if (!delivered(lock, chunk.bytes)) {
        if (--reads == 0) counted.reading += now() - reading_since;
        break;
      }
      Statistics read;
      lock.unlock();
      const File& file = files[chunk.file];
      const std::string error = file.read(slot->buffer.data + chunk.position, chunk.offset, chunk.bytes, read);
      lock.lock();
      if (--reads == 0) counted.reading += now() - reading_since;
      counted.cached += read.cached;
      counted.direct += read.direct;
      counted.buffered += read.buffered;
      --slot->in_flight;
      ++slot->done;
      if (!error.empty() && slot->error.empty()) {
        slot->error = file.path() + ": " + layers[slot->layer].name + ": " + error;
      }
      if (slot->state == Slot::kDropped) {
        if (slot->in_flight == 0) {
          slot->state = Slot::kFree;
          work.notify_all();
        }
      } else if (!slot->error.empty() || whole(*slot)) {
        if (slot->error.empty()) record({Event::kRead, slot->layer, slot->begin, now(), bytes[slot->layer]});
        filled.notify_all();
      }
    }
  }

  // Waits as long as a storage of `bytes_per_second` would take that does one read after another. Returns false if the
  // thread must stop.
  bool delivered(std::unique_lock<std::mutex>& lock, int64_t chunk_bytes) {
    if (options.bytes_per_second <= 0) return true;
    const std::chrono::duration<double> took(chunk_bytes / options.bytes_per_second);
    store_free = std::max(store_free, Clock::now()) + std::chrono::duration_cast<Clock::duration>(took);
    const Clock::time_point until = store_free;
    work.wait_until(lock, until, [&] { return stopping || Clock::now() >= until; });
    return !stopping;
  }

  void drop_front() {
    Slot& slot = slots[ahead.front()];
    ahead.pop_front();
    slot.state = slot.in_flight > 0 ? Slot::kDropped : Slot::kFree;
    counted.dropped += slot.issued > 0;
  }

  // Makes `layer` the first of the layers ahead, or the next layer to read. Drops the layers ahead that are before it.
  void aim_at(int layer) {
    started = true;
    const bool expected = ahead.empty() ? schedule[next] == layer : slots[ahead.front()].layer == layer;
    if (expected) return;
    ++counted.mispredicted;
    const bool there = std::any_of(ahead.begin(), ahead.end(), [&](int i) { return slots[i].layer == layer; });
    while (!ahead.empty() && !(there && slots[ahead.front()].layer == layer)) drop_front();
    if (!there) {
      const auto from = schedule.begin() + next;
      auto found = std::find(from, schedule.end(), layer);
      if (found == schedule.end()) found = std::find(schedule.begin(), from, layer);
      next = found - schedule.begin();
    }
  }

  // A caller's turn. It lasts as long as this object. The constructor waits for the turn, as `acquire` waits.
  struct Turn {
    State& s;
    Turn(State& s, std::unique_lock<std::mutex>& lock, const std::function<bool()>& interrupted) : s(s) {
      while (s.taken) s.wait(lock, interrupted);
      s.taken = true;
    }
    ~Turn() {  // the lock is held
      s.taken = false;
      s.filled.notify_all();
    }
  };

  // Waits until something may have changed, but at most kSignalsEvery. Then it calls `interrupted`.
  void wait(std::unique_lock<std::mutex>& lock, const std::function<bool()>& interrupted) {
    if (filled.wait_for(lock, kSignalsEvery) == std::cv_status::no_timeout) return;
    lock.unlock();
    const bool stop = interrupted();
    lock.lock();
    if (stop) throw Interrupted();
  }

  void check_usable() const {
    if (getpid() != pid) {
      throw std::runtime_error("streamer: made in process " + std::to_string(pid) + ", and this is " +
                               std::to_string(getpid()) + ", where nothing reads; load the model in this process");
    }
  }
};

Streamer::Streamer(const std::vector<std::string>& files, std::vector<Layer> layers, std::vector<int> schedule,
                   std::vector<Buffer> buffers, const Options& options)
    : state_(new State) {
  const auto expect = [](bool good, const std::string& words) {
    if (!good) throw std::invalid_argument("Streamer: " + words);
  };
  expect(options.threads > 0, "threads: expected at least 1, got " + std::to_string(options.threads));
  expect(options.block > 0 && options.block % kPage == 0,
         "block: expected a positive multiple of 4096, got " + std::to_string(options.block));
  expect(!buffers.empty(), "buffers: expected at least one, got none");
  expect(!schedule.empty(), "schedule: expected at least one layer, got none");
  int64_t needed = 0;
  for (const Layer& layer : layers) {
    std::vector<Chunk> chunks;
    int64_t total = 0;
    for (const Extent& e : layer.extents) {
      const std::string got = "[" + std::to_string(e.begin) + ", " + std::to_string(e.end) + ") of file " +
                              std::to_string(e.file) + " to " + std::to_string(e.position);
      expect(e.file >= 0 && e.file < static_cast<int>(files.size()) && e.begin >= 0 && e.begin < e.end &&
                 e.begin % kPage == 0 && e.position >= 0 && e.position % kPage == 0,
             "layers: " + layer.name + ": expected bytes of a file, from a multiple of 4096 to one, got " + got);
      for (int64_t at = e.begin; at < e.end; at += options.block) {
        const int64_t bytes = std::min(options.block, e.end - at);
        chunks.push_back({e.file, at, bytes, e.position + at - e.begin});
        total += bytes;
      }
      needed = std::max(needed, e.position + page_up(e.end - e.begin));
    }
    state_->chunks.push_back(std::move(chunks));
    state_->bytes.push_back(total);
  }
  for (int layer : schedule) {
    expect(layer >= 0 && layer < static_cast<int>(layers.size()),
           "schedule: expected layers 0 to " + std::to_string(layers.size() - 1) + ", got " + std::to_string(layer));
    expect(!state_->chunks[layer].empty(), "layers: " + layers[layer].name + ": expected an extent, got none");
  }
  for (const Buffer& buffer : buffers) {
    expect(buffer.bytes >= needed && reinterpret_cast<uintptr_t>(buffer.data) % kPage == 0,
           "buffers: expected " + std::to_string(needed) + " bytes from a multiple of 4096, got " +
               std::to_string(buffer.bytes) + " bytes");
    Slot slot;
    slot.buffer = buffer;
    state_->slots.push_back(slot);
  }
  for (const std::string& path : files) state_->files.emplace_back(path, options.source);
  state_->layers = std::move(layers);
  state_->schedule = std::move(schedule);
  state_->options = options;
  try {
    for (int i = 0; i < options.threads; ++i) {
      state_->threads.emplace_back([state = state_.get()] { state->read_ahead(); });
    }
  } catch (...) {  // a thread could not be started; the running threads must end before the state is destroyed
    close();
    throw;
  }
}

Streamer::~Streamer() { close(); }

void Streamer::start() {
  state_->check_usable();
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->started = true;
  state_->work.notify_all();
}

int Streamer::acquire(int layer, const std::function<bool()>& interrupted) {
  State& s = *state_;
  s.check_usable();
  const auto known = std::find(s.schedule.begin(), s.schedule.end(), layer) != s.schedule.end();
  if (!known) throw std::invalid_argument("Streamer: acquire: layer " + std::to_string(layer) + " is not scheduled");
  const double begin = now();
  std::unique_lock<std::mutex> lock(s.mutex);
  const State::Turn turn(s, lock, interrupted);
  if (!s.stopping) s.aim_at(layer);
  s.work.notify_all();
  for (;;) {
    if (s.stopping) throw std::runtime_error("streamer: " + s.layers[layer].name + ": the streamer is closed");
    if (!s.ahead.empty()) {
      Slot& slot = s.slots[s.ahead.front()];
      if (!slot.error.empty()) {
        const std::string error = slot.error;
        while (!s.ahead.empty()) s.drop_front();
        s.next = std::find(s.schedule.begin(), s.schedule.end(), layer) - s.schedule.begin();
        s.started = false;  // read nothing until somebody asks again
        throw ReadError(error);
      }
      if (s.whole(slot)) break;
    } else if (std::all_of(s.slots.begin(), s.slots.end(), [](const Slot& x) { return x.state == Slot::kHeld; })) {
      throw std::runtime_error("streamer: " + s.layers[layer].name + ": expected a buffer to read it to, all " +
                               std::to_string(s.slots.size()) + " are held");
    }
    s.wait(lock, interrupted);
  }
  const int held = s.ahead.front();
  s.ahead.pop_front();
  s.slots[held].state = Slot::kHeld;
  s.slots[held].begin = now();
  ++s.counted.layers;
  s.counted.waiting += s.slots[held].begin - begin;
  s.record({Event::kWait, layer, begin, s.slots[held].begin, 0});
  return held;
}

bool Streamer::ready(int layer) const {
  const State& s = *state_;
  s.check_usable();
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (s.ahead.empty()) return false;
  const Slot& slot = s.slots[s.ahead.front()];
  return slot.layer == layer && (!slot.error.empty() || s.whole(slot));
}

void Streamer::release(int held) {
  State& s = *state_;
  s.check_usable();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (held < 0 || held >= static_cast<int>(s.slots.size()) || s.slots[held].state != Slot::kHeld) {
    throw std::invalid_argument("Streamer: release: expected a slot that is held, got " + std::to_string(held));
  }
  Slot& slot = s.slots[held];
  slot.state = Slot::kFree;
  s.record({Event::kHold, slot.layer, slot.begin, now(), 0});
  s.work.notify_all();
}

void Streamer::close() {
  State& s = *state_;
  s.check_usable();
  std::unique_lock<std::mutex> lock(s.mutex);
  s.stopping = true;
  s.work.notify_all();
  s.filled.notify_all();
  const State::Turn turn(s, lock, [] { return false; });
  lock.unlock();
  for (std::thread& thread : s.threads) {
    if (thread.joinable()) thread.join();
  }
  lock.lock();
}

Statistics Streamer::statistics() const {
  state_->check_usable();
  const std::lock_guard<std::mutex> lock(state_->mutex);
  Statistics out = state_->counted;
  if (state_->reads > 0) out.reading += now() - state_->reading_since;
  return out;
}

std::vector<Event> Streamer::take_events() {
  state_->check_usable();
  const std::lock_guard<std::mutex> lock(state_->mutex);
  std::vector<Event> out(state_->events.begin(), state_->events.end());
  state_->events.clear();
  return out;
}

bool Streamer::in_own_process() const { return getpid() == state_->pid; }

}  // namespace headstart::stream
