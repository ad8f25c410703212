// CUDA itself: see device.hpp.
//
// Nothing happens at load: the first call that needs a device starts CUDA, after what must be in the environment before that.

#include "device.hpp"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "../abi/deepep.h"
#include "../kernels/launch.hpp"
#include "read_device.hpp"

namespace deepep {
namespace {

struct Cuda {
  cudaError_t error = cudaSuccess;  // of the start
  int driver = 0;
  int runtime = 0;
  std::vector<Device> devices;
  std::mutex mutex;            // of what follows
  std::vector<bool> prepared;  // by device
};

bool has_mps_pipe() {
  const char* const folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
  return access((std::string(folder ? folder : "/tmp/nvidia-mps") + "/control").c_str(), F_OK) == 0;
}

// Set only where the user has not: a kernel that is loaded while others spin waits for them, and they for it; and ranks that
// share a process need a hardware queue each, or one rank's kernel stands behind another's that waits for it. Under MPS it is
// processes that share the device's queues: with 32 each the first few would leave none to the others.
void set_environment() {
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", has_mps_pipe() ? "4" : "32", 0);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) cudaGetLastError();
  return value;
}

// An older driver does not know the attribute; then the control pipe of a running MPS says it.
bool has_mps(int device) {
  int value = 0;
  if (cudaDeviceGetAttribute(&value, cudaDevAttrMpsEnabled, device) == cudaSuccess) return value != 0;
  cudaGetLastError();
  return has_mps_pipe();
}

Device describe_device(int index) {
  Device device;
  device.index = index;
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, index) == cudaSuccess) {
    device.name = properties.name;
    memcpy(device.uuid, properties.uuid.bytes, sizeof device.uuid);
  }
  device.num_sms = attribute(cudaDevAttrMultiProcessorCount, index);
  device.compute_capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.shared_bytes = static_cast<uint32_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  device.mps = has_mps(index);
  return device;
}

Cuda* start() {
  auto* const cuda = new Cuda;  // Never freed: threads of a process that exits may still look into it.
  set_environment();
  cudaRuntimeGetVersion(&cuda->runtime);
  cudaDriverGetVersion(&cuda->driver);
  int count = 0;
  cuda->error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // It must not turn up as the result of somebody's next call.
  if (cuda->error != cudaSuccess) return cuda;
  for (int i = 0; i < count; ++i) cuda->devices.push_back(describe_device(i));
  cuda->prepared.resize(cuda->devices.size());
  return cuda;
}

// What is wrong with this machine, and what to do.
[[noreturn]] void reject_start(const Cuda& cuda) {
  if (cuda.driver == 0) {
    reject(DEEPEP_ERROR_SYSTEM,
           "no NVIDIA driver was found (libcuda.so.1): install one for CUDA %d.%d or later, or take the cpu "
           "backend",
           cuda.runtime / 1000, cuda.runtime % 1000 / 10);
  }
  if (cuda.error == cudaErrorInsufficientDriver) {
    reject(DEEPEP_ERROR_SYSTEM, "the NVIDIA driver is for CUDA %d.%d, this library needs one for CUDA %d.%d or later",
           cuda.driver / 1000, cuda.driver % 1000 / 10, cuda.runtime / 1000, cuda.runtime % 1000 / 10);
  }
  if (cuda.error == cudaErrorNoDevice || cuda.error == cudaSuccess) {
    reject(DEEPEP_ERROR_SYSTEM, "there is a driver, but no GPU that this process may use (is CUDA_VISIBLE_DEVICES empty?)");
  }
  reject(DEEPEP_ERROR_SYSTEM, "CUDA did not start: %s (%s)", cudaGetErrorString(cuda.error), cudaGetErrorName(cuda.error));
}

Cuda& cuda() {
  static Cuda* const started = start();
  if (started->devices.empty()) reject_start(*started);
  return *started;
}

}  // namespace

void reject_cuda(cudaError_t error, const char* doing) {
  cudaGetLastError();
  const int32_t code = error == cudaErrorMemoryAllocation         ? DEEPEP_ERROR_OUT_OF_MEMORY
                       : error == cudaErrorNoKernelImageForDevice ? DEEPEP_ERROR_UNSUPPORTED
                                                                  : DEEPEP_ERROR_SYSTEM;
  reject(code, "CUDA could not %s: %s (%s)", doing, cudaGetErrorString(error), cudaGetErrorName(error));
}

int num_devices() { return static_cast<int>(cuda().devices.size()); }

int driver_version() { return cuda().driver; }

const Device& find_device(uint64_t index) {
  const Cuda& all = cuda();
  if (index < all.devices.size()) return all.devices[index];
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "device is %lld, there are %zu (0 … %zu)", static_cast<long long>(index),
         all.devices.size(), all.devices.size() - 1);
}

const Device& prepare_device(uint64_t index) {
  const Device& device = find_device(index);
  Cuda& all = cuda();
  const std::lock_guard lock(all.mutex);
  use_device(device.index);
  const Relaxed relaxed;
  if (all.prepared[index]) return device;
  const cudaError_t error = load_kernels(all.devices[index].launches_early);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    reject(DEEPEP_ERROR_UNSUPPORTED,
           "this library has no code for %s, whose compute capability is %d.%d: it needs 8.0 or later",
           device_name(device).c_str(), device.compute_capability / 10, device.compute_capability % 10);
  }
  DEEPEP_CUDA("load the kernels", error);
  prepare_reads(device.index);
  all.prepared[index] = true;
  return device;
}

void use_device(int index) {
  // The runtime keeps the present device for each thread, and others may change it: ask, which costs next to nothing.
  int present = -1;
  if (cudaGetDevice(&present) == cudaSuccess && present == index) return;
  DEEPEP_CUDA("select the device", cudaSetDevice(index));
}

std::string device_name(const Device& device) { return "GPU " + std::to_string(device.index) + " (" + device.name + ")"; }

}  // namespace deepep
