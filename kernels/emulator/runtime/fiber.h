// Fibers: a stack for each thread of a block, and a switch between them that saves only what the calling convention
// says a call keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <sys/mman.h>

namespace emulator {

// Saves the caller's context in `*saved` and continues the one `to` was saved as.
extern "C" void nibble_switch_fiber(void** saved, void* to);

asm(R"(
.text
.hidden nibble_switch_fiber
.globl nibble_switch_fiber
.type nibble_switch_fiber, @function
nibble_switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size nibble_switch_fiber, . - nibble_switch_fiber
)");

constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t GUARD_BYTES = 4096;

// Stacks of one size, side by side, each with a page below it that faults.
class Stacks {
  public:
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    ~Stacks() {
        for (char* block : blocks_) munmap(block, GUARD_BYTES + STACK_BYTES);
    }

    // The lowest byte of stack `index`.
    char* low(size_t index) {
        while (blocks_.size() <= index) {
            void* block = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (block == MAP_FAILED) __builtin_trap();
            mprotect(block, GUARD_BYTES, PROT_NONE);
            blocks_.push_back(static_cast<char*>(block));
        }
        return blocks_[index] + GUARD_BYTES;
    }

    // A context that starts in `entry`, which must not return.
    static void* start(char* low, void (*entry)()) {
        // At a function's first instruction the stack is 8 below a multiple of 16.
        void** top = reinterpret_cast<void**>(low + STACK_BYTES - 64);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
        return top;
    }

  private:
    std::vector<char*> blocks_;
};

}  // namespace emulator
