// The instruction sets that the CPU supports, and functions that do not depend on one.

#include <omp.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

extern "C" __attribute__((visibility("default"))) int loray_supports(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 3)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    unsigned a = 0, b, c, d;
    if (isa == 2 && (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1 << 4))) return 0;  // AVX-VNNI
    if (isa == 1 || isa == 2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == 0;
}

// Ends the OpenMP threads that wait for the calling thread's next parallel region.
extern "C" __attribute__((visibility("default"))) int loray_release_threads() {
    return omp_pause_resource_all(omp_pause_soft);
}
