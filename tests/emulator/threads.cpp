// Threads of the operating system: see threads.hpp.

#include "threads.hpp"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace emulator {
namespace {

struct Pool {
  std::mutex mutex;
  std::condition_variable more;
  std::deque<std::function<void()>> tasks;
  size_t num_idle = 0;
};

void serve(Pool& pool) {
  std::unique_lock lock(pool.mutex);
  for (;;) {
    pool.num_idle += 1;
    pool.more.wait(lock, [&] { return !pool.tasks.empty(); });
    pool.num_idle -= 1;
    const std::function<void()> task = std::move(pool.tasks.front());
    pool.tasks.pop_front();
    lock.unlock();
    task();
    lock.lock();
  }
}

}  // namespace

void run_elsewhere(std::function<void()> task) {
  static Pool* const pool = new Pool;
  const std::lock_guard lock(pool->mutex);
  pool->tasks.push_back(std::move(task));
  if (pool->num_idle >= pool->tasks.size()) return pool->more.notify_one();
  // The signals of the process are none of theirs; a handler would run on the stack of a fiber.
  sigset_t all, before;
  sigfillset(&all);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, fault);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  std::thread([] { serve(*pool); }).detach();
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace emulator
