"""The CUDA C++ source of the mix: one template, one kernel a pair of types (`kernel_name`).

A thread takes 16 bytes of the narrower operand at a time. Elements before the first 16-byte
boundary of `src` and after the last whole group are taken one by one; where `dst` is not on a
boundary when `src` is, all are (slower, still right): memory of elements is aligned to their own
size and no more. `src` is read through the read-only path, which is sound while nobody writes it
during the kernel. Squares are added up in float32 over one group and in double from there: over
the thread, the warp, the block, and with one atomic addition a block into `*distance`; null: not
asked for. The order of those additions varies, so its last digits do.

No header is included, so that NVRTC needs nothing but itself: float16 goes by two PTX conversions,
bfloat16 by its bits, as on the CPU. The ``__f*_rn`` forms keep the compiler from fusing what
`contract` says is rounded one by one; the kernel waits for memory, not for them.

**Untested on hardware**: proved are compilation for sm_90 and, on a CPU, the arithmetic
(tests/test_cuda_source.py).

Rejected: `cuda_bf16.h` and `cuda_fp16.h` (CuPy's wheels come without them); a second kernel for
the squared distance (a second pass); loads wider than 16 bytes (Blackwell has them, sm_90 not).
"""

from __future__ import annotations

from ucxgossip.kernels.contract import PAIRS

THREADS = 256
"""Threads a block; the source has it as THREADS."""

ELEMENTS = 8
"""At most so many elements does a thread take at a time."""

_TEMPLATE = r"""
#ifndef THREADS
#define THREADS 256
#endif

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

template <typename T> struct Arithmetic { typedef float type; };
template <> struct Arithmetic<double> { typedef double type; };

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value)
{
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float widen(float16 value)
{
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

__device__ __forceinline__ void narrow(float value, float &to) { to = value; }
__device__ __forceinline__ void narrow(double value, double &to) { to = value; }
__device__ __forceinline__ void narrow(float value, bfloat16 &to)
{
    const unsigned bits = __float_as_uint(value);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<unsigned short>(value != value ? (bits >> 16) | 0x40u : rounded);
}
__device__ __forceinline__ void narrow(float value, float16 &to)
{
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

__device__ __forceinline__ float minus(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double minus(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ float moved(float from, float weight, float by)
{
    return __fadd_rn(from, __fmul_rn(weight, by));
}
__device__ __forceinline__ double moved(double from, double weight, double by)
{
    return __dadd_rn(from, __dmul_rn(weight, by));
}

// N elements as whole 16-byte words, which is how they are loaded and stored.
template <typename T, int N> union Group {
    uint4 words[N * sizeof(T) / 16];
    T values[N];
    __device__ __forceinline__ Group() {}
};

// Mixes one element; adds the square of the difference to total.
template <typename D, typename S, typename A>
__device__ __forceinline__ void mix_one(D &dst, S src, A alpha, A &total)
{
    const A theirs = widen(src), own = widen(dst);
    const A difference = minus(theirs, own);
    narrow(alpha == A(1) ? theirs : moved(own, alpha, difference), dst);
    total += difference * difference;
}

// Adds what all threads of the block give to *distance.
__device__ __forceinline__ void add_up(double total, double *distance)
{
    __shared__ double warps[THREADS / 32];
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        total += __shfl_down_sync(0xffffffffu, total, lanes);
    }
    if (threadIdx.x % 32 == 0) {
        warps[threadIdx.x / 32] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < THREADS / 32; ++warp) {
            total += warps[warp];
        }
        atomicAdd(distance, total);
    }
}

template <typename D, typename S, typename A>
__device__ __forceinline__ void mix(D *__restrict__ dst, const S *__restrict__ src, A alpha,
                                    long long count, double *distance)
{
    const int each = 16 / sizeof(S);
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;

    const unsigned long long past = reinterpret_cast<unsigned long long>(src) % 16;
    long long head = past == 0 ? 0 : (16 - past) / sizeof(S);
    head = head < count ? head : count;
    const bool both = reinterpret_cast<unsigned long long>(dst + head) % 16 == 0;
    const long long groups = both ? (count - head) / each : 0;

    double total = 0;
    for (long long group = thread; group < groups; group += step) {
        const long long first = head + group * each;
        Group<D, each> own;
        Group<S, each> theirs;
        uint4 *words = reinterpret_cast<uint4 *>(dst + first);
        const uint4 *others = reinterpret_cast<const uint4 *>(src + first);
        #pragma unroll
        for (int i = 0; i < static_cast<int>(each * sizeof(S) / 16); ++i) {
            theirs.words[i] = __ldg(others + i);
        }
        #pragma unroll
        for (int i = 0; i < static_cast<int>(each * sizeof(D) / 16); ++i) {
            own.words[i] = words[i];
        }
        A squares = 0;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            mix_one(own.values[i], theirs.values[i], alpha, squares);
        }
        #pragma unroll
        for (int i = 0; i < static_cast<int>(each * sizeof(D) / 16); ++i) {
            words[i] = own.words[i];
        }
        total += squares;
    }
    const long long grouped = groups * each;
    for (long long left = thread; left < count - grouped; left += step) {
        const long long at = left < head ? left : left + grouped;
        A square = 0;
        mix_one(dst[at], src[at], alpha, square);
        total += square;
    }
    if (distance != 0) {
        add_up(total, distance);
    }
}

#define KERNEL(D, S)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                   \
    mix_##D##_##S(D *dst, const S *src, Arithmetic<D>::type alpha, long long count,         \
                  double *distance)                                                         \
    {                                                                                       \
        mix<D, S, Arithmetic<D>::type>(dst, src, alpha, count, distance);                   \
    }

typedef float float32;
typedef double float64;
"""


def kernel_name(dst: str, src: str) -> str:
    """The kernel that mixes `src` into `dst`, by the contract's names of types.

    Its parameters: dst, src (pointers), alpha (float; double for float64), count (elements, 64
    bits), distance (pointer to a double, or null).
    """
    return f"mix_{dst}_{src}"


SOURCE = _TEMPLATE + "".join(f"KERNEL({dst}, {src})\n" for dst, src in PAIRS)
"""CUDA C++ for NVRTC, C++17, sm_60 (atomic addition of doubles) and later."""
