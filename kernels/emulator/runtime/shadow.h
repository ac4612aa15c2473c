// Who accessed each two bytes of shared memory last: finds races by rule, whatever order the threads ran in.
//
// Two accesses of different threads to the same bytes, one of them a write, must have a block barrier between them, or,
// within a warp, a warp barrier (shuffles and the like order no memory). Barriers are numbered by one growing stamp; an
// access carries the stamp of its time, so "was there a barrier since" is a comparison. An asynchronous copy writes at
// any time from its start to its end: nobody may touch its destination in between.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

struct Access {
    enum Kind : uint16_t { ONE_THREAD, ONE_WARP, MANY_WARPS, PENDING_COPY };
    uint32_t stamp;
    uint16_t thread;
    uint16_t kind;
};

// Who asks, and the stamps of the latest barriers that ordered it after others.
struct Accessor {
    uint32_t thread;
    uint32_t block_barrier;
    uint32_t warp_barrier;
};

class Shadow {
  public:
    static constexpr uint32_t GRANULE = 2;

    uint32_t stamp = 1;
    uint32_t block_start = 1;
    uint32_t block_barrier = 1;

    void resize(uint32_t bytes) {
        uint32_t granules = (bytes + GRANULE - 1) / GRANULE;
        if (cells_.size() < granules) cells_.resize(granules);
    }

    // Forgets all accesses: everything from now on is after them.
    void start_block() { block_start = block_barrier = ++stamp; }
    void pass_block_barrier() { block_barrier = ++stamp; }
    uint32_t pass_warp_barrier() { return ++stamp; }

    // Each gives what is in the way of the access, or null, and enters the access.
    const Access* read(uint32_t offset, uint32_t size, const Accessor& who) {
        for (uint32_t i = offset / GRANULE; i <= (offset + size - 1) / GRANULE; i++) {
            Cell& cell = cells_[i];
            if (unordered_write(cell.write, who)) return &cell.write;
            Access& read = cell.read;
            if (read.stamp < who.block_barrier || (same_warp(read, who) && read.stamp < who.warp_barrier) ||
                (read.kind == Access::ONE_THREAD && read.thread == who.thread)) {
                read = {stamp, static_cast<uint16_t>(who.thread), Access::ONE_THREAD};
            } else {
                read.kind = same_warp(read, who) ? Access::ONE_WARP : Access::MANY_WARPS;
                read.stamp = stamp;
            }
        }
        return nullptr;
    }

    const Access* write(uint32_t offset, uint32_t size, const Accessor& who, bool pending_copy = false) {
        uint16_t kind = pending_copy ? Access::PENDING_COPY : Access::ONE_THREAD;
        for (uint32_t i = offset / GRANULE; i <= (offset + size - 1) / GRANULE; i++) {
            Cell& cell = cells_[i];
            if (unordered_write(cell.write, who)) return &cell.write;
            if (unordered_read(cell.read, who)) return &cell.read;
            cell.write = {stamp, static_cast<uint16_t>(who.thread), kind};
        }
        return nullptr;
    }

    // The latest of the writes to the bytes.
    Access latest_write(uint32_t offset, uint32_t size) const {
        Access latest = cells_[offset / GRANULE].write;
        for (uint32_t i = offset / GRANULE; i <= (offset + size - 1) / GRANULE; i++) {
            if (cells_[i].write.stamp > latest.stamp) latest = cells_[i].write;
        }
        return latest;
    }

    // The end of a copy that `write` entered as pending.
    void finish_copy(uint32_t offset, uint32_t size, const Accessor& who) {
        for (uint32_t i = offset / GRANULE; i <= (offset + size - 1) / GRANULE; i++) {
            cells_[i].write = {stamp, static_cast<uint16_t>(who.thread), Access::ONE_THREAD};
        }
    }

  private:
    struct Cell {
        Access write;
        Access read;
    };

    static bool same_warp(const Access& access, const Accessor& who) {
        return access.kind != Access::MANY_WARPS && access.thread / 32 == who.thread / 32;
    }

    bool unordered_write(const Access& write, const Accessor& who) const {
        if (write.kind == Access::PENDING_COPY) return write.stamp >= block_start;
        return write.stamp >= who.block_barrier && write.thread != who.thread &&
               !(same_warp(write, who) && write.stamp < who.warp_barrier);
    }

    static bool unordered_read(const Access& read, const Accessor& who) {
        return read.stamp >= who.block_barrier && !(read.kind == Access::ONE_THREAD && read.thread == who.thread) &&
               !(same_warp(read, who) && read.stamp < who.warp_barrier);
    }

    std::vector<Cell> cells_;
};

}  // namespace emulator
