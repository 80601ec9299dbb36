// Divides a loop among threads so that what a thread has left, while the system has stopped it, is done by the others.
//
// Each thread has an equal range of its own, in order, so that what it prefetches is what it needs next. When it is done
// with it, it takes what is left of the others' ranges. Iterations must be independent of each other.
#pragma once

#include <atomic>

#include "kernels.h"

namespace LORAY_NAMESPACE {

class Shares {
  public:
    // Made outside the parallel region. Any number of threads may work on them, also one.
    Shares(i64 num, int threads) : num_(num), shares_(int(max_(1, min_(min_(i64(threads), i64(MOST)), num)))) {
        for (int s = 0; s < shares_; s++) next_[s].at.store(first(s), std::memory_order_relaxed);
    }

    // Inside the region: f(i, end) for each i of [0, num) in one thread, which goes on to end − 1. The region's end is the
    // barrier.
    template <class F>
    void each(int thread, F f) {
        for (int k = 0; k < shares_; k++) {
            const int s = (thread + k) % shares_;
            const i64 end = first(s + 1);
            while (next_[s].at.load(std::memory_order_relaxed) < end) {
                const i64 i = next_[s].at.fetch_add(1, std::memory_order_relaxed);
                if (i >= end) break;
                f(i, end);
            }
        }
    }

  private:
    static constexpr int MOST = 64;
    struct alignas(64) Next {
        std::atomic<i64> at;
    };

    i64 first(int share) const { return num_ * share / shares_; }

    i64 num_;
    int shares_;
    Next next_[MOST];
};

}  // namespace LORAY_NAMESPACE
