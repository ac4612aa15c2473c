// Who wrote each two bytes of global memory in this launch: finds races between the threads of a block, and data that
// goes from one block to another without a fence and an atomic after it.
//
// Blocks run one after another, so a block always sees what earlier ones wrote; on a card it may not. What a block wrote
// is released to others when a thread of it has passed a device_fence and then an atomic. Which thread's writes the fence
// covers is not followed further, so a fence that another thread should have made is not missed.
#pragma once

#include <cstdint>
#include <vector>

#include <sys/mman.h>

#include "interface.h"

namespace emulator {

struct GlobalWrite {
    // One more than the block's number, 0 for no write.
    uint32_t block;
    uint32_t stamp;
    uint16_t thread;
    // Some thread has read it as memory that no thread writes.
    bool read_only;
};

class GlobalShadow {
  public:
    static constexpr uint64_t GRANULE = 2;

    GlobalShadow() = default;
    GlobalShadow(const GlobalShadow&) = delete;
    ~GlobalShadow() {
        for (Table& table : tables_) {
            if (table.records) munmap(table.records, table.bytes);
        }
    }

    // The records of a range, made when it is first asked for: pages that are not touched cost nothing.
    GlobalWrite* records(const NibbleRange& range, uint64_t index) {
        if (tables_.size() <= index) tables_.resize(index + 1, {nullptr, 0});
        Table& table = tables_[index];
        if (!table.records) {
            table.bytes = (range.end - range.start + GRANULE) / GRANULE * sizeof(GlobalWrite);
            void* memory = mmap(nullptr, table.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                -1, 0);
            if (memory == MAP_FAILED) __builtin_trap();
            table.records = static_cast<GlobalWrite*>(memory);
        }
        return table.records;
    }

    void start(uint32_t blocks) { released_.resize(blocks, 0); }

    // The stamps before which a block's writes are released to the others.
    uint32_t& released(uint32_t block) { return released_[block]; }

  private:
    struct Table {
        GlobalWrite* records;
        size_t bytes;
    };
    std::vector<Table> tables_;
    std::vector<uint32_t> released_;
};

}  // namespace emulator
