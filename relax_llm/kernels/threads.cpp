// The threads of a library, which share the loops of its kernels: what generated code calls in place of TVM's pool.
//
// TVM's pool gives every thread a fixed part of a loop, and waits for all of them by spinning. Where other programs
// want the processors too, every loop takes as long as the thread that the system lets wait longest: a fiftieth of the
// speed was seen. Here
//   - a loop is cut into TASKS. A thread begins with its own share of them, in order, and then takes what is left of
//     the others' shares. Nobody waits for a thread that did not begin: only for those that are at a task.
//   - Who has nothing to do spins for some microseconds and then sleeps, so that others can have the core. Who is woken is
//     kept off the core of the thread that wakes it: Linux puts it there when it ran there last, and has both take turns
//     of three milliseconds with the other core idle.
//   - A thread that was kept from its core in the middle of a task is waited for, at most for as long as the system
//     serves somebody else. Where that happens twice within a short time the caller does without other threads for some
//     multiple of it, and for a larger one where it goes on. Then a neighbour has one core, and the loops run on the other
//     at the speed that one core has.
//   - Who waits for the next loop asks for the weight or cache that will be read there: see ahead.hpp. The caller, who does
//     alone what lies between two loops, asks for some of its share before.
//
// Tasks do not depend on each other, so that results are the same whoever runs which.

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ahead.hpp"

namespace {

constexpr int kTasks = TASKS;
constexpr int kMostThreads = 64;
constexpr int kSpins = 2500;    // looks before a thread sleeps: some fifty microseconds, more than between most loops
constexpr int kAwake = 4;       // times as many before it sleeps again when it was woken, and came too late
constexpr int kWaits = 2500;    // looks before the caller sleeps until others are through
constexpr int kSteps = 4;       // of asking ahead that the caller takes as a loop ends
constexpr int kMostInVain = 7;  // loops for which nobody is woken after one was, and came too late

struct Group {  // TVMParallelGroupEnv
  void *sync_handle;
  int32_t num_task;
};

typedef int (*Loop)(int task, Group *group, void *data);
typedef int64_t Ticks;

constexpr Ticks kLong = 100000;  // some thirty microseconds: shorter waits are those for a task's end
constexpr Ticks kClose = 3;      // waits that begin within this multiple of their length are of one cause
constexpr Ticks kAlone = 16;     // multiple of such a wait for which the caller does without other threads, at most
constexpr Ticks kFirst = 2;      // and the first time: each time that it goes on, twice as long

inline Ticks ticks() {
#ifdef __x86_64__
  return static_cast<Ticks>(__builtin_ia32_rdtsc());
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

inline int processor() {  // that this thread runs on; -1 where the system does not tell
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// A thread that sleeps, and is to be woken on another processor than that of the one who wakes it, where there is one.
class Sleeper {
 public:
  void sleeps() {  // said by the thread itself, before it sleeps
#ifdef __linux__
    id_ = static_cast<pid_t>(syscall(SYS_gettid));
#endif
  }

  void keep_off(int taken) {  // said by the one who is about to wake it
#ifdef __linux__
    if (!id_ || away_ || taken < 0 || sched_getaffinity(id_, sizeof all_, &all_) != 0) return;
    cpu_set_t others = all_;
    CPU_CLR(taken, &others);
    away_ = CPU_COUNT(&others) > 0 && CPU_ISSET(taken, &all_) && sched_setaffinity(id_, sizeof others, &others) == 0;
#endif
  }

  void woke() {  // said by the thread itself: it may go anywhere now
#ifdef __linux__
    if (away_) sched_setaffinity(0, sizeof all_, &all_);
    away_ = false;
    id_ = 0;
#endif
  }

 private:
#ifdef __linux__
  pid_t id_ = 0;  // 0: it does not sleep
  bool away_ = false;
  cpu_set_t all_;  // where it may run
#endif
};

int wanted_threads() {
  int wanted = 0;
  if (const char *text = getenv("TVM_NUM_THREADS")) wanted = atoi(text);
#ifdef __linux__
  cpu_set_t processors;
  if (wanted < 1 && sched_getaffinity(0, sizeof processors, &processors) == 0) wanted = CPU_COUNT(&processors);
#endif
  if (wanted < 1) wanted = static_cast<int>(std::thread::hardware_concurrency());
  return wanted < 1 ? 1 : wanted < kMostThreads ? wanted : kMostThreads;
}

struct Tasks {
  int first, end;  // alike where there are none

  int count() const { return end - first; }
  Tasks quarter() const { return {first, first + (count() + 3) / 4}; }
};

// The tasks of a thread in a loop, and the loop, on one cache line: all that the thread looks at to begin. It takes tasks
// from the front, and others from the back. So what others take is the same in every loop, as long as all threads are as
// fast, and rows of a model's tensors stay in the caches of one core. To take some the thread waits until all that it has
// written is in its cache: it takes a quarter of what is left, and others one.
class alignas(64) Share {
 public:
  void begin(unsigned number, Loop loop, void *data, Tasks tasks) {
    loop_.store(loop, std::memory_order_relaxed);
    data_.store(data, std::memory_order_relaxed);
    range_.store(range(number, tasks), std::memory_order_release);
  }

  // The number of the loop. What else is here is that loop's only if tasks of it can be taken afterwards: it goes on
  // until they are done, and nothing is written here before.
  unsigned number() const { return static_cast<unsigned>(range_.load(std::memory_order_acquire) >> 32); }
  Loop loop() const { return loop_.load(std::memory_order_relaxed); }
  void *data() const { return data_.load(std::memory_order_relaxed); }

  Tasks front(unsigned number) {
    return take(number, [](Tasks left) { return left.quarter(); });
  }

  Tasks back(unsigned number) {
    return take(number, [](Tasks left) { return Tasks{left.end - 1, left.end}; });
  }

 private:
  static uint64_t range(unsigned number, Tasks tasks) {
    return static_cast<uint64_t>(number) << 32 | static_cast<uint64_t>(tasks.end) << 16 | static_cast<uint64_t>(tasks.first);
  }

  template <typename Some>
  Tasks take(unsigned number, Some some) {
    uint64_t seen = range_.load(std::memory_order_relaxed);
    for (;;) {
      const Tasks left = {static_cast<int>(seen & 0xffff), static_cast<int>(seen >> 16 & 0xffff)};
      if (seen >> 32 != number || left.first == left.end) return {0, 0};
      const Tasks taken = some(left);
      const Tasks rest = taken.first == left.first ? Tasks{taken.end, left.end} : Tasks{left.first, taken.first};
      if (range_.compare_exchange_weak(seen, range(number, rest), std::memory_order_acq_rel, std::memory_order_relaxed))
        return taken;
    }
  }

  std::atomic<uint64_t> range_{0};
  std::atomic<Loop> loop_{nullptr};
  std::atomic<void *> data_{nullptr};
};

// How many tasks of a loop a thread has done, which only it writes.
class alignas(64) Done {
 public:
  void store(unsigned number, int tasks) {
    done_.store(static_cast<uint64_t>(number) << 32 | static_cast<unsigned>(tasks), std::memory_order_release);
  }

  int of(unsigned number) const {
    const uint64_t done = done_.load(std::memory_order_acquire);
    return done >> 32 == number ? static_cast<int>(done) : 0;
  }

 private:
  std::atomic<uint64_t> done_{0};
};

class Threads {
 public:
  int launch(Loop loop, void *data) {
    if (busy_.exchange(true, std::memory_order_acquire)) return alone(loop, data);  // another thread's loop is shared
    if (count_ == 0) start();
    const Ticks began = ticks();
    const int failed = count_ == 1 || alone_until_ > began ? alone(loop, data) : shared(loop, data, began);
    busy_.store(false, std::memory_order_release);
    return failed;
  }

  void begins(const Ahead::Span &span) { ahead_.begins(span); }

  void serve(int self);

  void stop() {  // before the library is unloaded
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_.store(true);
      work_.notify_all();
    }
    for (int i = 1; i < count_; i++) pthread_join(threads_[i], nullptr);
    count_ = 1;
  }

  void forget() { new (this) Threads(); }  // after a fork: the child has none of the threads

 private:
  static int alone(Loop loop, void *data) {
    Group group = {nullptr, 1};
    return loop(0, &group, data);
  }

  void start();
  int shared(Loop loop, void *data, Ticks began);
  int run(Loop loop, void *data, Tasks tasks);
  int work(int self, Loop loop, void *data, unsigned number, int done);
  void wait(int missing);
  bool through(int missing) const;

  std::atomic<bool> busy_{false};
  int count_ = 0;                   // of threads, the caller's among them; 0: not started
  Ticks alone_until_ = 0, late_ = 0;  // see kAlone; when the last long wait, and what it led to, ended
  Ticks alone_for_ = kFirst;        // multiple of the next such wait
  int skip_ = 0, in_vain_ = 0;      // loops for which nobody is woken, for the last was over before they came

  unsigned number_ = 0;             // of the loop
  std::atomic<int> failed_{0};
  Share shares_[kMostThreads];
  Done done_[kMostThreads];         // not the caller's
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> waiting_{false}, stopping_{false};
  std::mutex mutex_;
  std::condition_variable work_, all_;
  Sleeper sleepers_[kMostThreads];  // under the mutex
  pthread_t threads_[kMostThreads] = {};
  Ahead ahead_;
  Ahead::Place asked_;              // by the caller
};

alignas(Threads) unsigned char memory[sizeof(Threads)];
Threads &threads = *new (memory) Threads();

int Threads::shared(Loop loop, void *data, Ticks began) {
  failed_.store(0, std::memory_order_relaxed);
  number_ = number_ + 1 ? number_ + 1 : 1;
  for (int i = 1; i < count_; i++) {
    shares_[i].begin(number_, loop, data, {kTasks * i / count_, kTasks * (i + 1) / count_});
  }
  const Tasks own = {0, kTasks / count_}, first = own.quarter();
  shares_[0].begin(number_, loop, data, {first.end, own.end});
  const bool wakes = asleep_.load() && --skip_ < 0;  // who goes to sleep at this moment may sleep through the loop
  if (wakes) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 1; i < count_; i++) sleepers_[i].keep_off(processor());
    work_.notify_all();
  }
  const int done = work(0, loop, data, number_, run(loop, data, first));
  const Ticks through = ticks();
  wait(kTasks - done);
  const Ticks now = ticks(), waited = now - through;
  int steps = 0;
  ahead_.ask(asked_, 0, count_, [&] { return steps++ == kSteps; });
  if (done < kTasks) {
    skip_ = in_vain_ = 0;
  } else if (wakes) {
    skip_ = in_vain_ = in_vain_ < kMostInVain ? 2 * in_vain_ + 1 : kMostInVain;
  }
  if (waited > kLong && waited > (through - began) / 4) {
    const bool again = began - late_ < kClose * waited;
    late_ = now;
    if (again) {
      late_ = alone_until_ = now + alone_for_ * waited;
      alone_for_ = alone_for_ < kAlone ? 2 * alone_for_ : kAlone;
    } else {
      alone_for_ = kFirst;
    }
  }
  return failed_.load(std::memory_order_relaxed);
}

int Threads::run(Loop loop, void *data, Tasks tasks) {  // gives their number
  Group group = {nullptr, kTasks};
  for (int task = tasks.first; task < tasks.end; task++) {
    if (const int failed = loop(task, &group, data)) failed_.store(failed, std::memory_order_relaxed);
  }
  return tasks.count();
}

// Do what is left of a thread's own tasks, and of those of others; gives how many it has done, with those before.
int Threads::work(int self, Loop loop, void *data, unsigned number, int done) {
  for (int i = 0; i < count_; i++) {
    Share &share = shares_[(self + i) % count_];
    for (Tasks tasks; (tasks = i ? share.back(number) : share.front(number)).count();) {
      done += run(loop, data, tasks);
      if (self) done_[self].store(number, done);
    }
  }
  return done;
}

bool Threads::through(int missing) const {
  for (int i = 1; missing && i < count_; i++) missing -= done_[i].of(number_);
  return !missing;
}

void Threads::wait(int missing) {  // for those who are at a task
  ahead_.ask(asked_, 0, count_, [=] { return through(missing); });
  for (int i = 0; i < kWaits; i++) {
    if (through(missing)) return;
    spin_pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  waiting_.store(true);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  all_.wait(lock, [=] { return through(missing); });
  waiting_.store(false);
}

void Threads::serve(int self) {
  unsigned last = 0;
  int patience = kSpins;
  Ahead::Place place;
  const Share &share = shares_[self];
  const auto begun = [&] { return share.number() != last; };
  while (!stopping_.load(std::memory_order_relaxed)) {
    int spins = 0;
    if (last) ahead_.ask(place, self, count_, begun);
    while (spins < patience && !begun()) {
      spin_pause();
      spins++;
    }
    if (spins == patience) {
      std::unique_lock<std::mutex> lock(mutex_);
      asleep_.fetch_add(1);
      while (!stopping_.load() && !begun()) {
        sleepers_[self].sleeps();
        work_.wait(lock);
        sleepers_[self].woke();
      }
      asleep_.fetch_sub(1);
      lock.unlock();
      patience = kSpins * kAwake;
    }
    if (!begun()) continue;
    last = share.number();
    void *const data = share.data();
    __builtin_prefetch(data);
    if (work(self, share.loop(), data, last, 0)) patience = kSpins;
    std::atomic_thread_fence(std::memory_order_seq_cst);  // before it looks whether somebody waits, all is said to be done
    if (waiting_.load()) {
      std::lock_guard<std::mutex> lock(mutex_);
      all_.notify_one();
    }
  }
}

void *serve(void *self) {
  threads.serve(static_cast<int>(reinterpret_cast<intptr_t>(self)));
  return nullptr;
}

void Threads::start() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { threads.forget(); });
  static_cast<void>(registered);
  const int wanted = wanted_threads();
  int made = 1;
  while (made < wanted && !pthread_create(&threads_[made], nullptr, ::serve, reinterpret_cast<void *>(intptr_t{made})))
    made++;
  count_ = made;
}

struct Unloading {
  ~Unloading() { threads.stop(); }
} unloading;

int launch(Loop loop, void *data, int) { return threads.launch(loop, data); }

}  // namespace

// What generated code calls: as a kernel begins that reads much, and the variable for its loops. That one is hidden: TVM's
// loader does not find it, and leaves it as it is.
extern "C" {
__attribute__((visibility("hidden"))) void ANNOUNCE(const char *start, int64_t bytes, int64_t parts, int64_t apart, int64_t paced) {
  threads.begins({start, bytes, parts, apart, paced != 0});
}

extern __attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Loop, void *, int);
int (*__TVMBackendParallelLaunch)(Loop, void *, int) = launch;
}
