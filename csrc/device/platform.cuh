// One include that gives a kernel its language: nvcc's own, or the CPU execution of csrc/host.
#pragma once
#include <cstdint>

#ifdef CNK_HOST
#include "../host/execution.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Thread-block clusters exist from sm_90 on; a kernel that needs them has no body below that.
#if defined(CNK_HOST) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define CNK_HAS_CLUSTERS 1
#else
#define CNK_HAS_CLUSTERS 0
#endif
