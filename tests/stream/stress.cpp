// The streamer under the sanitizers: callers in order, out of order and at once, files cut short, ends at any point.
// Usage: stress FOLDER. Prints what is wrong and returns 1.

#include "../../csrc/stream/streamer.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace headstart::stream;

namespace {

constexpr int kLayers = 7, kSlots = 3;
constexpr int64_t kLayerBytes = 5 * kPage;

void expect(bool good, const char* what) {
  if (good) return;
  std::printf("expected: %s\n", what);
  std::exit(1);
}

struct Fixture {
  std::string path;
  std::vector<Layer> layers;
  std::vector<int> schedule;
  std::vector<std::unique_ptr<char, decltype(&std::free)>> memory;
  std::vector<Buffer> buffers;

  explicit Fixture(const std::string& folder) : path(folder + "/weights") {
    std::vector<char> bytes(kLayers * kLayerBytes);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i / kPage * 31 + i % 251);
    const int fd = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    expect(fd >= 0 && write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()), "a written file");
    close(fd);
    for (int i = 0; i < kLayers; ++i) {
      // Two extents, the second first in the buffer, and a ragged end.
      const int64_t at = i * kLayerBytes, middle = at + 2 * kPage;
      layers.push_back(
          {"layer " + std::to_string(i), {{0, middle, at + kLayerBytes - 5, 0}, {0, at, middle, 3 * kPage}}});
      schedule.push_back(i);
    }
    for (int i = 0; i < kSlots; ++i) {
      memory.emplace_back(static_cast<char*>(std::aligned_alloc(kPage, kLayerBytes)), &std::free);
      buffers.push_back({memory.back().get(), kLayerBytes});
    }
  }

  void check(int slot, int layer) const {
    const char* data = buffers[slot].data;
    const auto byte = [](int64_t i) { return static_cast<char>(i / kPage * 31 + i % 251); };
    const int64_t at = layer * kLayerBytes;
    for (int64_t i = 0; i < 3 * kPage - 5; ++i) expect(data[i] == byte(at + 2 * kPage + i), "the file's bytes");
    for (int64_t i = 0; i < 2 * kPage; ++i) expect(data[3 * kPage + i] == byte(at + i), "the file's bytes");
  }
};

bool never() { return false; }

void callers(const Fixture& f, const Options& options, int threads, int rounds, bool in_order) {
  Streamer streamer({f.path}, f.layers, f.schedule, f.buffers, options);
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < rounds; ++i) {
        const int layer = in_order ? i % kLayers : static_cast<int>(random() % kLayers);
        const int slot = streamer.acquire(layer, never);
        f.check(slot, layer);
        streamer.release(slot);
        if (i % 5 == 0) streamer.take_events();
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  const Statistics s = streamer.statistics();
  expect(s.layers == static_cast<int64_t>(threads) * rounds, "every layer counted");
  if (in_order && threads == 1) expect(s.mispredicted == 0 && s.dropped == 0, "nothing read for nothing");
}

void ends_anywhere(const Fixture& f, Options options) {
  std::mt19937 random(1);
  for (int i = 0; i < 60; ++i) {
    options.bytes_per_second = i % 3 == 0 ? 4e6 : 0;
    auto streamer =
        std::make_unique<Streamer>(std::vector<std::string>{f.path}, f.layers, f.schedule, f.buffers, options);
    std::atomic<bool> closed{false};
    std::thread caller([&] {
      try {
        for (int k = 0;; ++k) streamer->release(streamer->acquire(k % kLayers, never));
      } catch (const std::runtime_error&) {
        closed = true;
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
    streamer->close();
    caller.join();
    expect(closed, "an exception for a caller when it is closed");
  }
}

void interrupted(const Fixture& f, Options options) {
  options.bytes_per_second = 1e5;
  Streamer streamer({f.path}, f.layers, f.schedule, f.buffers, options);
  int asked = 0;
  try {
    streamer.acquire(0, [&] { return ++asked == 3; });
    expect(false, "an interrupted wait");
  } catch (const Interrupted&) {
  }
}

void cut_short(const Fixture& f, const Options& options) {
  expect(truncate(f.path.c_str(), 3 * kLayerBytes + kPage) == 0, "a truncated file");
  Streamer streamer({f.path}, f.layers, f.schedule, f.buffers, options);
  for (int round = 0; round < 3; ++round) {
    for (int layer = 0; layer < 3; ++layer) {
      const int slot = streamer.acquire(layer, never);
      f.check(slot, layer);
      streamer.release(slot);
    }
    try {
      streamer.acquire(3, never);
      expect(false, "an error for a layer that is not whole");
    } catch (const ReadError& error) {
      expect(std::string(error.what()).find(f.path + ": layer 3: expected ") == 0,
             "an error that names file and layer");
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  Fixture f(arguments[1]);
  for (const Source source : {Source::kAuto, Source::kDirect, Source::kCached}) {
    Options options;
    options.source = source;
    options.block = 2 * kPage;
    callers(f, options, 1, 200, true);
    callers(f, options, 1, 200, false);
    callers(f, options, 3, 60, true);
    callers(f, options, 3, 60, false);
    ends_anywhere(f, options);
    interrupted(f, options);
  }
  cut_short(f, Options());
  std::printf("good\n");
}
