// The watchdog: one thread of the process that looks after all its buffers while something is under way.
//
// In: buffers. Out: Buffer::watch() every few milliseconds, as long as one of them has something pending: it tells the device
// which peers have gone, and takes note of ends that nobody asks for. It sleeps otherwise, and ends before CUDA does when the
// process exits. Callers: creation, enqueue, destruction.
#pragma once

#include <memory>

namespace deepep {

class Buffer;

// From now on the buffer is looked after, until it is gone or forgotten.
void watchdog_add(std::weak_ptr<Buffer> buffer);
// No longer; when this returns the thread does not hold it, so that it is never the one that lets go of it last: that would
// call CUDA while the process may be exiting. Not with a Buffer::mutex held.
void watchdog_forget(const std::shared_ptr<Buffer>& buffer);
// Something is pending. A load when the watchdog is awake.
void watchdog_wake() noexcept;

}  // namespace deepep
