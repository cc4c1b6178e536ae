// Which weight is read after which, and asking for it while a thread has nothing else to do.
//
// Between two products of a token there are short kernels, which one thread does alone, and between two tokens there is
// the host: for a tenth of the time and more nobody reads memory. A model reads its weights in the same order for every
// token, and each product says which one it reads as it begins. So a thread that waits for a loop asks for what it will
// multiply with there: for its share of the weights that came next the last time, as much as its second-level cache
// holds. The thread that launches has all between loops to do, and asks for some lines before it goes on. These are
// hints. Where the order changes, or a weight is gone, lines are read in vain, and nothing else happens.

#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <stdint.h>
#include <unistd.h>

#include <atomic>

class Ahead {
 public:
  // Where a thread goes on asking.
  struct Place {
    const char *weight = nullptr;
    int64_t share = 0, at = 0;  // bytes of the thread's share; of it, asked for
  };

  // A product begins that reads this weight.
  void begins(const char *weight, int64_t bytes) {
    const char *before = current_.load(std::memory_order_relaxed);
    if (weight == before) return;
    Entry &entry = after(before);
    entry.before.store(before, std::memory_order_relaxed);
    entry.weight.store(weight, std::memory_order_relaxed);
    entry.bytes.store(bytes, std::memory_order_relaxed);
    current_.store(weight, std::memory_order_relaxed);
  }

  // Ask for a thread's share of what comes next, until there is something else to do.
  template <typename Busy>
  void ask(Place &place, int thread, int threads, Busy busy) {
    int64_t asked = distance(place, threads);
    if (asked < 0) {
      asked = 0;
      place = Place();
    }
    for (; asked < most(); asked += kStep) {
      if (busy()) return;
      if (place.at >= place.share) {
        const char *before = place.weight ? place.weight : current_.load(std::memory_order_relaxed);
        const Entry &next = after(before);
        if (next.before.load(std::memory_order_relaxed) != before) return;
        place.weight = next.weight.load(std::memory_order_relaxed);
        place.share = next.bytes.load(std::memory_order_relaxed) / threads;
        place.at = 0;
      }
      const char *start = place.weight + place.share * thread / kLine * kLine + place.at;
      prefetch(start, kStep);
      place.at += kStep;
    }
  }

 private:
  static constexpr int kLine = 64, kStep = 8 * kLine;  // after a step a thread looks whether it is waited for
  static constexpr int kEntries = 1024;

  struct Entry {  // of a table by what came before; of two in one place the later one stays
    std::atomic<const char *> before{nullptr}, weight{nullptr};
    std::atomic<int64_t> bytes{0};
  };

  Entry &after(const char *weight) {
    return entries_[(reinterpret_cast<uintptr_t>(weight) / kLine * 0x9e3779b97f4a7c15u) >> 54];
  }

  // Bytes that a thread has asked for of what comes after the current weight; negative where its place is not there.
  int64_t distance(const Place &place, int threads) {
    const char *weight = current_.load(std::memory_order_relaxed);
    for (int64_t bytes = 0; place.weight && bytes < most();) {
      const Entry &next = after(weight);
      if (next.before.load(std::memory_order_relaxed) != weight) break;
      weight = next.weight.load(std::memory_order_relaxed);
      if (weight == place.weight) return bytes + place.at;
      bytes += next.bytes.load(std::memory_order_relaxed) / threads + kStep;
    }
    return -1;
  }

  static void prefetch(const char *start, int bytes) {
    static const bool first = into_first_level();
    for (int line = 0; line < bytes; line += kLine) {
      first ? __builtin_prefetch(start + line, 0, 3) : __builtin_prefetch(start + line, 0, 2);
    }
  }

  static bool into_first_level() {  // as kernels ask on this processor: `Machine.streams_into`
#ifdef __x86_64__
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);  // avx_vnni
#else
    return false;
#endif
  }

  static int64_t most() {  // bytes that a thread asks for: its second-level cache
#ifdef _SC_LEVEL2_CACHE_SIZE
    static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
    static const int64_t size = 0;
#endif
    return size;
  }

  Entry entries_[kEntries];
  std::atomic<const char *> current_{nullptr};
};
