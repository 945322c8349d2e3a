// The routing decision of one decoding step, and the IF node that hangs on it, in one kernel.
// What it computes is `reference_decode_router` of decode_router.py. Compiled at run time (engine/branch.py).

typedef unsigned long long handle_t;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(handle_t handle, unsigned int value);

__device__ float element(const void* x, long long at, int kind) {
    if (kind == 0) return ((const float*)x)[at];
    unsigned short bits = ((const unsigned short*)x)[at];
    if (kind == 1) return __uint_as_float((unsigned int)bits << 16);  // bfloat16
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));  // float16
    return value;
}

// One block of 1024 threads: B is small. The warps of a row share its sum.
extern "C" __global__ void route(
    handle_t handle, const void* x, int kind, long long stride, int rows, int size, int warps,
    const float* weight, const float* bias, const float* threshold, const long long* position, int keep_first,
    const long long* forced, float* gate, bool* keep, bool* any) {
    __shared__ float partial[32];
    __shared__ int anyone;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = warp % warps;
    if (threadIdx.x == 0) anyone = 0;
    for (int first = 0; first < rows; first += 32 / warps) {
        int row = first + warp / warps;
        float sum = 0.0f;
        if (row < rows) {
#pragma unroll 4
            for (int at = share * 32 + lane; at < size; at += warps * 32)
                sum += element(x, row * stride + at, kind) * weight[at];
        }
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane == 0) partial[warp] = sum;
        __syncthreads();
        if (share == 0 && lane == 0 && row < rows) {
            float logit = bias[0];
            for (int other = 0; other < warps; other++) logit += partial[warp + other];
            float g = 1.0f / (1.0f + expf(-logit));
            const bool* table = (const bool*)forced[0];  // address of a routing table, or 0
            bool kept = table ? table[row * forced[1] + min(position[row], forced[1] - 1)]
                              : g >= threshold[0] || position[row] < keep_first;
            gate[row] = g;
            keep[row] = kept;
            if (kept) atomicOr(&anyone, 1);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        any[0] = anyone != 0;
        cudaGraphSetConditional(handle, anyone);
    }
}

extern "C" __global__ void set_condition(handle_t handle, const bool* flag) {
    cudaGraphSetConditional(handle, *flag ? 1u : 0u);
}
