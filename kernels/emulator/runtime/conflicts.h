// Accesses of single lanes put together again to the requests that their warp made: bank conflicts in shared memory,
// sectors of global memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "interface.h"

namespace emulator {

constexpr uint64_t NO_ACCESS = ~0ull;
constexpr uint64_t SECTOR_BYTES = 32;

// Whether each eight lanes' 16-byte accesses lie in eight different groups of four banks: the common case, quickly.
inline bool side_by_side(const uint64_t* offsets, uint32_t lanes) {
    for (uint32_t first = 0; first < lanes; first += 8) {
        uint32_t groups = 0;
        for (uint32_t lane = first; lane < first + 8; lane++) {
            if (offsets[lane] == NO_ACCESS) return false;
            groups |= 1u << (offsets[lane] / 16 % 8);
        }
        if (groups != 255) return false;
    }
    return true;
}

// Cycles that lanes' accesses of `size` bytes at `offsets` take: as many as there are different 4-byte words in one of
// the 32 banks. At most 128 bytes are served at once, so wider accesses are served in phases. Gives the number of
// phases, and the cycles above one for each.
inline void count_cycles(const uint64_t* offsets, uint32_t lanes, uint32_t size, uint64_t& phases, uint64_t& extra) {
    if (size == 16 && lanes % 8 == 0 && side_by_side(offsets, lanes)) {
        phases += lanes / 8;
        return;
    }
    uint32_t words = size < 4 ? 1 : size / 4;
    uint32_t lanes_per_phase = 32 / words;
    for (uint32_t first = 0; first < lanes; first += lanes_per_phase) {
        uint64_t found[32][32];
        uint32_t counts[32] = {};
        uint32_t cycles = 0;
        for (uint32_t lane = first; lane < first + lanes_per_phase && lane < lanes; lane++) {
            if (offsets[lane] == NO_ACCESS) continue;
            for (uint32_t part = 0; part < words; part++) {
                uint64_t word = offsets[lane] / 4 + part, bank = word % 32;
                bool known = false;
                for (uint32_t i = 0; i < counts[bank]; i++) known |= found[bank][i] == word;
                if (!known) found[bank][counts[bank]++] = word;
                if (counts[bank] > cycles) cycles = counts[bank];
            }
        }
        phases += cycles > 0;
        extra += cycles > 1 ? cycles - 1 : 0;
    }
}

// Sectors of 32 bytes, the unit in which global memory is moved, that lanes' accesses of `size` bytes at `addresses` touch,
// and as many as the bytes they ask for would fill.
inline void count_sectors(const std::array<uint64_t, 32>& addresses, uint32_t size, uint64_t& sectors, uint64_t& full) {
    std::array<uint64_t, 32> sorted = addresses;
    if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
    uint64_t bytes = 0, next_byte = 0, next_sector = 0;
    for (uint64_t address : sorted) {
        if (address == NO_ACCESS) break;
        uint64_t end = address + size;
        bytes += end > next_byte ? end - std::max(address, next_byte) : 0;
        next_byte = std::max(end, next_byte);
        uint64_t first = std::max(address / SECTOR_BYTES, next_sector), behind = (end - 1) / SECTOR_BYTES + 1;
        sectors += behind > first ? behind - first : 0;
        next_sector = std::max(behind, next_sector);
    }
    full += (bytes + SECTOR_BYTES - 1) / SECTOR_BYTES;
}

// The accesses of a warp since its lanes last were at one place. The i-th time that each lane was at one instruction is
// taken for one request.
class AccessLog {
  public:
    // `position` is an offset in shared memory or an address in global memory.
    void add(const void* instruction, bool global, uint32_t lane, uint64_t position, uint32_t size) {
        Site& site = find(instruction, global, size);
        uint32_t time = site.times[lane]++;
        if (site.requests.size() <= time) {
            site.requests.emplace_back();
            site.requests.back().fill(NO_ACCESS);
        }
        site.requests[time][lane] = position;
        empty_ = false;
    }

    // Counts what was added and forgets it.
    void flush(NibbleReport& report) {
        if (empty_) return;
        for (Site& site : sites_) {
            for (auto& request : site.requests) {
                if (site.global) {
                    count_sectors(request, site.size, report.global_sectors, report.global_full_sectors);
                } else {
                    count_cycles(request.data(), 32, site.size, report.shared_cycles, report.shared_conflict_cycles);
                }
            }
            site.requests.clear();
            site.times.fill(0);
        }
        empty_ = true;
    }

    void forget() {
        sites_.clear();
        latest_ = 0;
        empty_ = true;
    }

  private:
    struct Site {
        const void* instruction;
        bool global;
        uint32_t size;
        std::array<uint32_t, 32> times{};
        std::vector<std::array<uint64_t, 32>> requests;

        bool is(const void* its_instruction, bool its_global) const {
            return instruction == its_instruction && global == its_global;
        }
    };

    Site& find(const void* instruction, bool global, uint32_t size) {
        if (latest_ < sites_.size() && sites_[latest_].is(instruction, global)) return sites_[latest_];
        for (latest_ = 0; latest_ < sites_.size(); latest_++) {
            if (sites_[latest_].is(instruction, global)) return sites_[latest_];
        }
        sites_.push_back({instruction, global, size, {}, {}});
        return sites_[latest_];
    }

    std::vector<Site> sites_;
    size_t latest_ = 0;
    bool empty_ = true;
};

}  // namespace emulator
