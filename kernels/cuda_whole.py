"""The CUDA source of a mix that is done whole or not at all, for the engine's quarantine.

A NaN or an infinity anywhere in a chunk must change nothing of it (`ucxgossip.quarantine`). A GPU
knows so only once all blocks have looked, so there are two kernels in a row on one stream: `gauge`
reads both operands, and writes the squared distance and what was not finite beside it; `mix_whole`
mixes unless the first found something. The second finds the chunk in the cache that the first
filled. The host learns what was left out later, from the same two words.

A launch does a run of chunks, with one row of blocks (``blockIdx.y``) and one pair of results each:
what is left out is a chunk, however many are mixed at a time.

The kernels of the engine are given the same arguments; the plain mix has no parameter for the last.

**Untested on hardware**: proved are compilation for sm_90 and, on a CPU, the arithmetic
(tests/test_cuda_whole.py).

Rejected: keeping what the target held and putting it back, as on the CPU (a buffer more, and the
same memory moved); one kernel that waits for all its blocks (a cooperative launch, which must fit
the device beside whatever else runs there).
"""

from __future__ import annotations

from ucxgossip.kernels.cuda_source import SOURCE, kernel_name

KINDS = ("float32", "float64")
"""Types that the engine mixes; each with itself."""

_WHOLE = r"""
#define CAME_IN 1ull
#define OWN 2ull

__device__ __forceinline__ float apart(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double apart(double a, double b) { return __dsub_rn(a, b); }
template <typename T> __device__ __forceinline__ bool finite(T value)
{
    return value - value == T(0);
}

// Adds one pair's squared difference to total, and to found whose value was not finite.
template <typename T>
__device__ __forceinline__ void gauge_one(T own, T theirs, T &total, unsigned long long &found)
{
    const T difference = apart(theirs, own);
    total += difference * difference;
    if (!finite(difference)) {
        const bool mine = !finite(own);
        found |= mine ? OWN : 0ull;
        found |= !mine || !finite(theirs) ? CAME_IN : 0ull;
    }
}

template <typename T>
__device__ __forceinline__ void gauge(const T *__restrict__ dst, const T *__restrict__ src,
                                      long long count, double *result)
{
    const int each = 16 / sizeof(T);
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;

    const unsigned long long past = reinterpret_cast<unsigned long long>(src) % 16;
    long long head = past == 0 ? 0 : (16 - past) / sizeof(T);
    head = head < count ? head : count;
    const bool both = reinterpret_cast<unsigned long long>(dst + head) % 16 == 0;
    const long long groups = both ? (count - head) / each : 0;

    double total = 0;
    unsigned long long found = 0;
    for (long long group = thread; group < groups; group += step) {
        const long long first = head + group * each;
        Group<T, each> own, theirs;
        own.words[0] = __ldg(reinterpret_cast<const uint4 *>(dst + first));
        theirs.words[0] = __ldg(reinterpret_cast<const uint4 *>(src + first));
        T squares = 0;
        #pragma unroll
        for (int i = 0; i < each; ++i) {
            gauge_one(own.values[i], theirs.values[i], squares, found);
        }
        total += squares;
    }
    const long long grouped = groups * each;
    for (long long left = thread; left < count - grouped; left += step) {
        const long long at = left < head ? left : left + grouped;
        T square = 0;
        gauge_one(dst[at], src[at], square, found);
        total += square;
    }
    if (found != 0) {
        atomicOr(reinterpret_cast<unsigned long long *>(result + 1), found);
    }
    add_up(total, result);
}

// The chunk that this row of blocks works on: from `first` on, `count` elements, `result`.
#define CHUNK_OF_ROW                                                                        \
    const long long first = blockIdx.y * chunk;                                             \
    count = count - first < chunk ? count - first : chunk;                                  \
    result += 2 * blockIdx.y;

#define WHOLE(T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                   \
    gauge_##T(T *dst, const T *src, T, long long count, double *result, long long chunk)    \
    {                                                                                       \
        CHUNK_OF_ROW                                                                        \
        gauge<T>(dst + first, src + first, count, result);                                  \
    }                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                   \
    mix_whole_##T(T *dst, const T *src, T alpha, long long count, double *result,           \
                  long long chunk)                                                          \
    {                                                                                       \
        CHUNK_OF_ROW                                                                        \
        if (*reinterpret_cast<const unsigned long long *>(result + 1) == 0) {               \
            mix<T, T, T>(dst + first, src + first, alpha, count, 0);                        \
        }                                                                                   \
    }
"""


def names(kind: str) -> tuple[str, str, str]:
    """The engine's kernels for `kind`: the plain mix, gauge, and the mix that heeds it.

    Parameters of each: dst, src (pointers), alpha (of the arrays' type), count (elements of all
    chunks, 64 bits), result (pointer to a double, the squared distance to add to, and the bits of
    what was not finite, `kernels.cpu.CAME_IN` and `OWN`; two words a chunk), chunk (elements of a
    chunk, 64 bits; the last one may be shorter). The grid has a row for each chunk; the plain mix
    has neither that parameter nor rows.
    """
    return kernel_name(kind, kind), f"gauge_{kind}", f"mix_whole_{kind}"


WHOLE_SOURCE = SOURCE + _WHOLE + "".join(f"WHOLE({kind})\n" for kind in KINDS)
"""CUDA C++ for NVRTC, C++17: `cuda_source.SOURCE` and the two kernels of each kind."""
