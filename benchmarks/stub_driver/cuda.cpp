// SPDX-License-Identifier: Apache-2.0
// The part of libcuda.so.1 that Triton's launcher calls. Nothing runs: modules
// and launches are counted and named, and each can be told to fail with a
// status of the driver.

#include <cuda.h>

#include <cstdio>
#include <cstring>

extern "C" {

struct StubLaunch {
  char kernel[256];
  unsigned grid[3];
  unsigned threads;
  unsigned shared_bytes;
};

enum { STUB_MOST = 65536 };
StubLaunch stub_launches[STUB_MOST];
char stub_kernels[STUB_MOST][256]; // by module, in the order of loading
long stub_launched = 0, stub_loaded = 0;
int stub_module_status = 0, stub_launch_status = 0;

static char context; // its address is the one context that there is

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult status, const char **text) {
  static thread_local char words[64];
  snprintf(words, sizeof words, "status %d of the stub driver", int(status));
  *text = words;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute,
                              CUdevice) {
  switch (attribute) { // those of an H200
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = 232448;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = 233472;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:
    *value = 132;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *found) {
  *found = reinterpret_cast<CUcontext>(&context);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice) {
  return cuCtxGetCurrent(found);
}

CUresult cuCtxGetLimit(size_t *value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *) {
  if (stub_module_status)
    return CUresult(stub_module_status);
  *module = reinterpret_cast<CUmodule>(stub_kernels[stub_loaded % STUB_MOST]);
  ++stub_loaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module,
                             const char *name) {
  char *own =
      reinterpret_cast<char *>(module); // a module of Triton holds one kernel
  snprintf(own, sizeof stub_kernels[0], "%s", name);
  *function = reinterpret_cast<CUfunction>(own);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute,
                            CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                                : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) {
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

// On an H200 as its whitepaper has it: 8 parts of 16 multiprocessors or more.
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction,
                                      const CUlaunchConfig *config) {
  unsigned blocks = 1;
  for (unsigned k = 0; k < config->numAttrs; ++k)
    if (config->attrs[k].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      blocks = config->attrs[k].value.clusterDim.x;
  *count = blocks > 16 ? 0 : 8 * (16 / blocks);
  return CUresult(stub_launch_status);
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute,
                               CUdeviceptr pointer) { // of a tensor on the CPU
  *static_cast<CUdeviceptr *>(value) = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                          void **, void **) {
  if (stub_launch_status)
    return CUresult(stub_launch_status);
  StubLaunch &launch = stub_launches[stub_launched++ % STUB_MOST];
  memcpy(launch.kernel, function, sizeof launch.kernel);
  launch.grid[0] = config->gridDimX;
  launch.grid[1] = config->gridDimY;
  launch.grid[2] = config->gridDimZ;
  launch.threads = config->blockDimX;
  launch.shared_bytes = config->sharedMemBytes;
  return CUDA_SUCCESS;
}
}
