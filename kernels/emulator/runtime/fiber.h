// Fibers: a stack for each thread of a block, and a switch between them that saves only what the calling convention
// says a call keeps.
#pragma once

#include <cstddef>
#include <cstdint>

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

// A stack's block: a page that names its owner, a page that faults, and the stack, which grows down to it. Blocks are
// aligned to their size, so that the owner is found from any address in the stack.
constexpr size_t BLOCK_BYTES = 128 << 10;
constexpr size_t OWNER_BYTES = 4096;
constexpr size_t GUARD_BYTES = 4096;
constexpr size_t STACK_BYTES = BLOCK_BYTES - OWNER_BYTES - GUARD_BYTES;

// The owner of the stack that runs.
__attribute__((always_inline)) inline void* stack_owner() {
    uintptr_t stack_pointer;
    asm("movq %%rsp, %0" : "=r"(stack_pointer));
    return *reinterpret_cast<void**>(stack_pointer & ~(BLOCK_BYTES - 1));
}

// Stacks of one size, side by side.
class Stacks {
  public:
    Stacks(size_t count, void* owner) : bytes_((count + 1) * BLOCK_BYTES) {
        mapping_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapping_ == MAP_FAILED) __builtin_trap();
        uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
        first_ = reinterpret_cast<char*>((start + BLOCK_BYTES - 1) & ~(BLOCK_BYTES - 1));
        for (size_t index = 0; index < count; index++) {
            char* block = first_ + index * BLOCK_BYTES;
            mprotect(block + OWNER_BYTES, GUARD_BYTES, PROT_NONE);
            *reinterpret_cast<void**>(block) = owner;
        }
    }
    Stacks(const Stacks&) = delete;
    ~Stacks() { munmap(mapping_, bytes_); }

    // The lowest byte of stack `index`.
    char* low(size_t index) const { return first_ + index * BLOCK_BYTES + OWNER_BYTES + GUARD_BYTES; }

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
    size_t bytes_;
    void* mapping_;
    char* first_;
};

}  // namespace emulator
