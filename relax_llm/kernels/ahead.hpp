// What is read after what, and asking for it while a thread has nothing else to do.
//
// Between two products of a token there are short kernels, which one thread does alone, and between two tokens there is
// the host: for a tenth of the time and more nobody reads memory. A model reads its weights and caches in the same order
// for every token, and each kernel that reads much says what it is as it begins. So a thread that waits for a loop asks
// for what it will read there: for its share of what came next both times before, as much as its second-level cache
// holds. Once is not enough: of two conversations that take turns each has caches of its own. The thread that launches
// has all between loops to do, and asks for some lines before it goes on. These are hints. Where the order changes, or
// memory is gone, lines are read in vain, and nothing else happens.
//
// A core can have a few lines on their way (Zen 4: some 24), and forgets what it is asked for beyond them. Most kernels
// leave it to the core to read ahead, and of lines that lie between others which are there already it sees no order: for
// those a thread asks at the speed of memory, so that all come. Where kernels ask for each line themselves, a thread does
// that as fast as it can, over more lines: they read what did not come while they multiply what did.

#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif
#include <stdint.h>
#include <unistd.h>

#include <atomic>

inline void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Ahead {
  static constexpr int kLine = 64, kStep = 8 * kLine;  // after a step a thread looks whether it is waited for
  static constexpr int kEntries = 1024, kProbes = 8;
  static constexpr int kPace = 2 * kStep;  // bytes between pauses, some 25 ns each: at most 40 GB/s

 public:
  // What one kernel reads: so many parts of so many bytes, each so far behind the start of the one before.
  struct Span {
    const char *start = nullptr;
    int64_t bytes = 0, parts = 0, apart = 0;
    bool paced = false;  // all lines are to come

    int64_t share(int threads) const { return bytes * parts / threads; }  // bytes of it for each thread
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
    Entry &entry = place_of(before);
    const bool again = entry.before.load(std::memory_order_relaxed) == before && entry.next.start() == span.start;
    entry.again.store(again, std::memory_order_relaxed);
    entry.before.store(before, std::memory_order_relaxed);
    entry.next.store(span);
    const uint64_t begun = begun_.load(std::memory_order_relaxed) + 1;
    begun_.store(begun, std::memory_order_relaxed);
    entry.used.store(begun, std::memory_order_relaxed);
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
      if (place.span.paced && place.at % kPace == 0) spin_pause();
    }
  }

 private:
  // A span that one thread writes while others read it. They may see parts of two: addresses to ask for in vain.
  class Shared {
   public:
    const char *start() const { return start_.load(std::memory_order_relaxed); }

    Span load() const {
      return {start(), bytes_.load(std::memory_order_relaxed), parts_.load(std::memory_order_relaxed),
              apart_.load(std::memory_order_relaxed), paced_.load(std::memory_order_relaxed)};
    }

    void store(const Span &span) {
      start_.store(span.start, std::memory_order_relaxed);
      bytes_.store(span.bytes, std::memory_order_relaxed);
      parts_.store(span.parts, std::memory_order_relaxed);
      apart_.store(span.apart, std::memory_order_relaxed);
      paced_.store(span.paced, std::memory_order_relaxed);
    }

   private:
    std::atomic<const char *> start_{nullptr};
    std::atomic<int64_t> bytes_{0}, parts_{0}, apart_{0};
    std::atomic<bool> paced_{false};
  };

  struct Entry {  // of a table by what came before
    std::atomic<const char *> before{nullptr};
    Shared next;
    std::atomic<bool> again{false};  // it came next the time before, too
    std::atomic<uint64_t> used{0};   // when it was last written
  };

  Entry &probed(const char *start, int probe) {
    const uintptr_t home = (reinterpret_cast<uintptr_t>(start) / kLine * 0x9e3779b97f4a7c15u) >> 54;
    return entries_[(home + probe) % kEntries];
  }

  // What came after a span; null where that is not known.
  const Entry *after(const char *start) {
    for (int i = 0; i < kProbes; i++) {
      const Entry &entry = probed(start, i);
      if (entry.before.load(std::memory_order_relaxed) == start) return &entry;
    }
    return nullptr;
  }

  // Where to write what comes after a span: its own place, or of some that written longest ago.
  Entry &place_of(const char *start) {
    Entry *oldest = &probed(start, 0);
    for (int i = 0; i < kProbes; i++) {
      Entry &entry = probed(start, i);
      if (entry.before.load(std::memory_order_relaxed) == start) return entry;
      if (entry.used.load(std::memory_order_relaxed) < oldest->used.load(std::memory_order_relaxed)) oldest = &entry;
    }
    return *oldest;
  }

  // Go on to a thread's share of what comes next; false where nothing is known to.
  bool follow(Place &place, int threads) {
    const Entry *entry = after(place.span.start ? place.span.start : current_.load(std::memory_order_relaxed));
    if (!entry || !entry->again.load(std::memory_order_relaxed)) return false;
    place.span = entry->next.load();
    place.share = place.span.share(threads);
    place.at = 0;
    return place.share > 0;
  }

  // Bytes that a thread has asked for of what comes after what is read now; negative where its place is not there.
  int64_t distance(const Place &place, int threads) {
    const char *start = current_.load(std::memory_order_relaxed);
    for (int64_t bytes = 0; place.span.start && bytes < most();) {
      const Entry *entry = after(start);
      if (!entry) break;
      const Span next = entry->next.load();
      start = next.start;
      if (start == place.span.start) return bytes + place.at;
      bytes += next.share(threads) + kStep;
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
  std::atomic<uint64_t> begun_{0};  // spans
  std::atomic<const char *> current_{nullptr};
};
