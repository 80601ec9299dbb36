// The instruction sets that the CPU supports, and functions that do not depend on one.

#include <omp.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Asks the system for the memory of AMX's tiles (ARCH_REQ_XCOMP_PERM of XTILEDATA), for all threads of the process.
static bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned a, b, c, d;
    constexpr unsigned BFLOAT16 = 1u << 22, TILES = 1u << 24;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & BFLOAT16 && d & TILES &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

extern "C" __attribute__((visibility("default"))) int loray_supports(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 4 && !may_use_tiles()) return 0;
    if (isa == 3 || isa == 4)
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
