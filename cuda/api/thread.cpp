// Threads of the library: see thread.hpp.

#include "thread.hpp"

#include <pthread.h>
#include <signal.h>

#include <system_error>
#include <thread>
#include <utility>

#include "../abi/deepep.h"
#include "../common/failure.hpp"

namespace deepep {
namespace {

// The runtime's signals (timers of a profiler, child exits) are none of our threads' business.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

void start_thread(const std::string& name, std::function<void()> body) {
  const SignalsBlocked blocked;
  try {
    std::thread([name = name.substr(0, 15), body = std::move(body)] {
      pthread_setname_np(pthread_self(), name.c_str());
      body();
    }).detach();
  } catch (const std::system_error& e) {
    reject(DEEPEP_ERROR_SYSTEM, "no thread could be started (%s)", e.what());
  }
}

}  // namespace deepep
