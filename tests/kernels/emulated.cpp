// Runs kernels of a library for ARM on the memory of the process that started this one.
//
// A pointer has the same value in both processes. When a kernel touches a page that is not here yet, the handler of the
// fault asks for it; when a kernel has returned, the words that it changed are sent back, and the pages are dropped.

#include <dlfcn.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

constexpr size_t PAGE = 4096, MOST = 1 << 18;

struct Page {
    char *at, *before;
};
static Page pages[MOST];
static size_t num_pages = 0;
static std::atomic_flag is_busy = ATOMIC_FLAG_INIT;

static void receive(void* to, size_t size) {
    for (char* at = (char*)to; size;) {
        const ssize_t got = read(0, at, size);
        if (got <= 0) _exit(0);  // the other process has ended
        at += got, size -= got;
    }
}

static void send(const void* from, size_t size) {
    for (const char* at = (const char*)from; size;) {
        const ssize_t put = write(1, at, size);
        if (put <= 0) _exit(0);
        at += put, size -= put;
    }
}

static void send(char kind, const void* at) {
    const uint64_t address = (uint64_t)at;
    send(&kind, 1);
    send(&address, 8);
}

static char* anywhere() {
    return (char*)mmap(nullptr, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static bool is_here(const char* at) {
    for (size_t i = num_pages; i > 0; i--)
        if (pages[i - 1].at == at) return true;
    return false;
}

// A page is here as a whole or not at all, since other threads read it too: it is filled elsewhere and moved.
static void fetch(int, siginfo_t* info, void*) {
    char* at = (char*)((uintptr_t)info->si_addr & ~(PAGE - 1));
    while (is_busy.test_and_set(std::memory_order_acquire)) sched_yield();
    if (mmap(at, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at) {
        char *page = anywhere(), *before = anywhere();
        send('P', at);
        receive(before, PAGE);
        memcpy(page, before, PAGE);
        if (num_pages == MOST || mremap(page, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at) _exit(1);
        pages[num_pages++] = {at, before};
    } else if (!is_here(at)) {  // not fetched by another thread meanwhile: taken by this process
        send('T', at);
        _exit(0);
    }
    is_busy.clear(std::memory_order_release);
}

static void give_back() {
    for (size_t i = 0; i < num_pages; i++) {
        const auto [at, before] = pages[i];
        const auto differs = [&](size_t k) { return memcmp(at + k, before + k, 8) != 0; };
        for (size_t k = 0; k < PAGE; k += 8) {
            if (!differs(k)) continue;
            const size_t first = k;
            while (k < PAGE && differs(k)) k += 8;
            const uint64_t size = k - first;
            send('W', at + first);
            send(&size, 8);
            send(at + first, size);
        }
        munmap(at, PAGE);
        munmap(before, PAGE);
    }
    num_pages = 0;
    send('E', nullptr);
}

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    struct sigaction action = {};
    action.sa_sigaction = fetch;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
    for (;;) {
        struct {
            uint64_t length, words[16];
            float reals[2];
        } call;
        receive(&call.length, 8);
        std::string name(call.length, 0);
        receive(name.data(), call.length);
        receive(call.words, sizeof call.words);
        receive(call.reals, 8);
        // Whole numbers and pointers are passed in registers, then on the stack, in order; floats in registers of their
        // own, wherever they stand among them. What a kernel does not expect it does not see.
        using Word = uint64_t;
        using Kernel = void (*)(Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word, Word,
                                Word, float, float);
        const Kernel kernel = (Kernel)dlsym(library, name.c_str());
        if (!kernel) return fprintf(stderr, "%s\n", dlerror()), 1;
        const Word* w = call.words;
        kernel(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15],
               call.reals[0], call.reals[1]);
        give_back();
    }
}
