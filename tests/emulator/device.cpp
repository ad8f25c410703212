// Devices and errors of the emulated runtime.
//
// In: the environment: EMULATED_DEVICES (1), EMULATED_SMS (32) and EMULATED_COMPUTE_CAPABILITY (90) of each, for which there
// are no kernels below 80; EMULATED_LATE_MS (0), how late all blocks of a grid but the first begin, as when other work fills
// the device. For machines that do not do: EMULATED_DRIVER_VERSION (13000), 0 for none; EMULATED_PEER_ACCESS (1), 0 for none
// between devices, 2 where asking fails; EMULATED_MPS (0), 1 where processes may share a device; EMULATED_IPC (0), 1 where
// there are handles, which nobody can open. Out: devices that reach each other's memory unless it says otherwise, and whose
// memory other processes cannot reach.

#include <sys/random.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "block.hpp"
#include "runtime.hpp"

namespace emulator {
namespace {

constexpr int kVersion = 13000;  // of CUDA

thread_local cudaError_t last_error = cudaSuccess;
thread_local int present_device = 0;

int num_devices() { return static_cast<int>(setting("EMULATED_DEVICES", 1)); }
int driver_version() { return static_cast<int>(setting("EMULATED_DRIVER_VERSION", kVersion)); }
bool exists(int device) { return device >= 0 && device < num_devices(); }

}  // namespace

cudaError_t fail(cudaError_t error) { return last_error = error; }

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* const text = getenv(name);
  return text ? strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace emulator

using emulator::fail;

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorUnsupportedPtxVersion: return "cudaErrorUnsupportedPtxVersion";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorPeerAccessAlreadyEnabled: return "cudaErrorPeerAccessAlreadyEnabled";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureMerge: return "cudaErrorStreamCaptureMerge";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t) { return "the emulated device says so"; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = emulator::kVersion;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulator::driver_version();
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::num_devices();
  if (emulator::driver_version() < emulator::kVersion) return fail(cudaErrorInsufficientDriver);  // also where there is none
  return *count == 0 ? fail(cudaErrorNoDevice) : cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::present_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (!emulator::exists(device)) return fail(cudaErrorInvalidDevice);
  emulator::present_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (!emulator::exists(device)) return fail(cudaErrorInvalidDevice);
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "emulated device");
  std::snprintf(properties->uuid.bytes, sizeof properties->uuid.bytes, "emu %d", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!emulator::exists(device)) return fail(cudaErrorInvalidDevice);
  const auto capability = static_cast<int>(emulator::setting("EMULATED_COMPUTE_CAPABILITY", 90));
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = static_cast<int>(emulator::setting("EMULATED_SMS", 32)); break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::kMostShared; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    case cudaDevAttrMpsEnabled: *value = emulator::setting("EMULATED_MPS", 0) != 0; break;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  if (!emulator::exists(device) || !emulator::exists(peer)) return fail(cudaErrorInvalidDevice);
  const uint64_t access = emulator::setting("EMULATED_PEER_ACCESS", 1);
  if (access > 1) return fail(cudaErrorNotSupported);
  *can = access == 1 && device != peer;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return emulator::exists(peer) ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr, int device, int peer) {
  if (!emulator::exists(device) || !emulator::exists(peer)) return fail(cudaErrorInvalidDevice);
  *value = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode present = cudaStreamCaptureModeGlobal;
  std::swap(present, *mode);
  return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void*) {
  if (emulator::setting("EMULATED_IPC", 0) == 0) return fail(cudaErrorNotSupported);
  *handle = {"emulated"};
  return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return fail(cudaErrorNotSupported); }
cudaError_t cudaIpcCloseMemHandle(void*) { return fail(cudaErrorNotSupported); }
