// LoRA rows of the pool that are prefetched while something else is computed.
//
// The base's products compute: for 32 tokens they take a third of the memory's bandwidth. The adapters of such a batch are
// read, and hardly computed with. So their rows are prefetched during the products before them, a few cache lines at a
// time, and come from the third-level cache when they are needed.
#pragma once

#include "../kernels.h"

namespace LORAY_NAMESPACE {

// `num` rows of the pool, of so many cache lines each.
struct RowLines {
    const char* pool;
    const i64* offsets;
    i64 element, num, lines;  // element: bytes

    i64 all() const { return num * lines; }
    const char* row(i64 i) const { return pool + offsets[i] * element; }
};

// A way through the lines of some rows.
struct Prefetch {
    const RowLines* rows = nullptr;
    i64 row = 0, line = 0;
    i64 left = 0;  // lines

    inline void some(i64 num) {
        for (num = min_(num, left), left -= num; num > 0;) {
            const i64 here = min_(num, rows->lines - line);
            if (rows->offsets[row] >= 0) {  // else the row is not in the pool
                const char* at = rows->row(row) + line * 64;
                for (i64 n = 0; n < here; n++) __builtin_prefetch(at + n * 64, 0, 2);
            }
            num -= here, line += here;
            if (line < rows->lines) return;
            line = 0;
            if (++row == rows->num) row = 0, rows++;
        }
    }
};

// All LoRA rows of a layer, in the order in which they are used.
class Ahead {
  public:
    Ahead() = default;

    template <class T>
    Ahead(const LayerTables<T>& tables, const T* pool, i64 num_adapters) {
        const Group<T>* const groups[] = {&tables.qkv, &tables.o, &tables.gate_up, &tables.down};
        for (const Group<T>* group : groups) {
            for (i64 k = 0; k < group->num; k++) add(*group->tables[k]->a, *group->tables[k], pool, num_adapters);
            for (i64 k = 0; k < group->num; k++) add(*group->tables[k]->b, *group->tables[k], pool, num_adapters);
        }
    }

    // Part `i` of `num` parts of what lies between the shares `first` and `last`, of `whole`.
    Prefetch part(const Meanwhile& share, i64 i, i64 num) const {
        const i64 begin = total_ * share.first / share.whole, all = total_ * share.last / share.whole - begin;
        i64 at = begin + all * i / num;
        Prefetch prefetch;
        prefetch.left = begin + all * (i + 1) / num - at;
        if (prefetch.left <= 0) return {};
        prefetch.rows = rows_;
        while (at >= prefetch.rows->all()) at -= prefetch.rows++->all();
        prefetch.row = at / prefetch.rows->lines, prefetch.line = at % prefetch.rows->lines;
        return prefetch;
    }

  private:
    static constexpr int MOST = 28;  // A and B of seven modules, two segments each; what is beyond it is not prefetched

    template <class T>
    void add(const Rows& rows, const Table& table, const T* pool, i64 num_adapters) {
        const i64 num = table.rank_start[num_adapters];
        for (i64 s = 0; s < rows.num_segments && num > 0 && num_ < MOST; s++) {
            const i64 lines = ceil_div(rows.segments[s].width * i64(sizeof(T)), 64);
            rows_[num_] = {(const char*)pool, rows.segments[s].offsets, i64(sizeof(T)), num, lines};
            total_ += rows_[num_++].all();
        }
    }

    int num_ = 0;
    i64 total_ = 0;
    RowLines rows_[MOST];
};

}  // namespace LORAY_NAMESPACE
