// What is read after what, and asking for it while a thread has nothing else to do.
//
// Between two products of a token there are short kernels, which one thread does alone, and between two tokens there is
// the host: for a tenth of the time and more nobody reads memory. A model reads its weights and caches in the same order
// for every token, and each kernel that reads much says what it is as it begins. So a thread that waits for a loop asks
// for what it will read there: for its share of what came next both times before, as much as its second-level cache
// holds. Once is not enough: of two conversations that take turns each has caches of its own. The thread that launches
// has all between loops to do, and asks for some lines before it goes on. These are hints. Where the order changes, or
// memory is gone, lines are read in vain, and nothing else happens.

#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <stdint.h>
#include <unistd.h>

#include <atomic>

class Ahead {
  static constexpr int kLine = 64, kStep = 8 * kLine;  // after a step a thread looks whether it is waited for
  static constexpr int kEntries = 1024;

 public:
  // What one kernel reads: so many parts of so many bytes, each so far behind the start of the one before.
  struct Span {
    const char *start = nullptr;
    int64_t bytes = 0, parts = 0, apart = 0;
  };

  // Where a thread goes on asking.
  struct Place {
    Span span;
    int64_t share = 0, at = 0;  // bytes of the thread's share; of it, asked for

    const char *next(int thread) const {  // what it asks for next, in this thread's share of all parts
      const int64_t offset = share * thread / kLine * kLine + at;
      return span.start + offset / span.bytes * span.apart + offset % span.bytes;
    }
  };

  // A kernel begins that reads this.
  void begins(const Span &span) {
    const char *before = current_.load(std::memory_order_relaxed);
    if (span.start == before) return;
    Entry &entry = after(before);
    const bool again = entry.before.load(std::memory_order_relaxed) == before &&
                       entry.start.load(std::memory_order_relaxed) == span.start;
    entry.again.store(again, std::memory_order_relaxed);
    entry.before.store(before, std::memory_order_relaxed);
    entry.start.store(span.start, std::memory_order_relaxed);
    entry.bytes.store(span.bytes, std::memory_order_relaxed);
    entry.parts.store(span.parts, std::memory_order_relaxed);
    entry.apart.store(span.apart, std::memory_order_relaxed);
    current_.store(span.start, std::memory_order_relaxed);
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
      if (place.at >= place.share && !follow(place, threads)) return;
      prefetch(place.next(thread), kStep);
      place.at += kStep;
    }
  }

 private:
  struct Entry {  // of a table by what came before; of two in one place the later one stays
    std::atomic<const char *> before{nullptr}, start{nullptr};
    std::atomic<int64_t> bytes{0}, parts{0}, apart{0};
    std::atomic<bool> again{false};  // it came next the time before, too
  };

  Entry &after(const char *start) {
    return entries_[(reinterpret_cast<uintptr_t>(start) / kLine * 0x9e3779b97f4a7c15u) >> 54];
  }

  // Go on to a thread's share of what comes next; false where nothing is known to.
  bool follow(Place &place, int threads) {
    const char *before = place.span.start ? place.span.start : current_.load(std::memory_order_relaxed);
    const Entry &next = after(before);
    if (next.before.load(std::memory_order_relaxed) != before || !next.again.load(std::memory_order_relaxed)) return false;
    place.span = {next.start.load(std::memory_order_relaxed), next.bytes.load(std::memory_order_relaxed),
                  next.parts.load(std::memory_order_relaxed), next.apart.load(std::memory_order_relaxed)};
    place.share = place.span.bytes * place.span.parts / threads;
    place.at = 0;
    return place.share > 0;
  }

  // Bytes that a thread has asked for of what comes after what is read now; negative where its place is not there.
  int64_t distance(const Place &place, int threads) {
    const char *start = current_.load(std::memory_order_relaxed);
    for (int64_t bytes = 0; place.span.start && bytes < most();) {
      const Entry &next = after(start);
      if (next.before.load(std::memory_order_relaxed) != start) break;
      start = next.start.load(std::memory_order_relaxed);
      if (start == place.span.start) return bytes + place.at;
      bytes += next.bytes.load(std::memory_order_relaxed) * next.parts.load(std::memory_order_relaxed) / threads + kStep;
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
