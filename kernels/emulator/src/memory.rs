//! The emulated device's memory: each allocation of exactly its size, with pages that fault on both sides.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr;

use nibble_kernels::device::cuda::driver::Address;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::library::Range;

const PAGE: usize = 4096;
/// Around each allocation: a wrong index by up to this much faults rather than reads a neighbour.
const MARGIN: usize = 1 << 20;
const ALIGNMENT: usize = 256;

/// Live allocations by their start.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    allocations: BTreeMap<Address, Allocation>,
}

/// A mapping that holds `bytes` bytes of device memory, ending as close to the upper margin as alignment allows.
#[derive(Debug)]
struct Allocation {
    bytes: usize,
    mapping: usize,
    mapping_bytes: usize,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the mapping was made for this allocation alone, and nobody holds its address any more.
        let unmapped = unsafe { munmap(ptr::with_exposed_provenance_mut(self.mapping), self.mapping_bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Memory {
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<Address, String> {
        if bytes == 0 {
            return Err("an allocation has at least one byte".to_owned());
        }
        let usable = bytes.next_multiple_of(ALIGNMENT).next_multiple_of(PAGE);
        let mapping_bytes = usable + 2 * MARGIN;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping wherever the system likes.
        let mapping = unsafe { mmap_anonymous(ptr::null_mut(), mapping_bytes, ProtFlags::empty(), flags) };
        let mapping = mapping.map_err(|error| error.to_string())?;
        let middle = mapping.wrapping_byte_add(MARGIN);
        // SAFETY: the range lies within the new mapping.
        let opened = unsafe { mprotect(middle, usable, MprotectFlags::READ | MprotectFlags::WRITE) };
        let allocation = Allocation { bytes, mapping: mapping.expose_provenance(), mapping_bytes };
        opened.map_err(|error| error.to_string())?;
        let address = (middle.expose_provenance() + usable - bytes) / ALIGNMENT * ALIGNMENT;
        self.allocations.insert(address as Address, allocation);
        Ok(address as Address)
    }

    pub(crate) fn free(&mut self, address: Address, bytes: usize) {
        let allocation = self.allocations.remove(&address);
        assert!(
            allocation.is_some_and(|allocation| allocation.bytes == bytes),
            "{bytes} bytes at {address:#x} were freed but not allocated"
        );
    }

    pub(crate) fn write(&self, from: &[u8], to: Address) -> Result<(), String> {
        let to = self.pointer(to, from.len())?;
        // SAFETY: the range was found in a live allocation, which only the driver's methods touch, under its lock.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    pub(crate) fn read(&self, from: Address, to: &mut [u8]) -> Result<(), String> {
        let from = self.pointer(from, to.len())?;
        // SAFETY: as in `write`.
        unsafe { ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    /// What kernels may access, sorted by start.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        let range = |(&start, allocation): (&Address, &Allocation)| Range {
            start,
            end: start + allocation.bytes as Address,
            is_weights: 0,
        };
        self.allocations.iter().map(range).collect()
    }

    fn pointer(&self, address: Address, bytes: usize) -> Result<*mut u8, String> {
        let allocation = self.allocations.range(..=address).next_back();
        match allocation {
            Some((start, allocation))
                if address - start + bytes as Address <= allocation.bytes as Address =>
            {
                Ok(ptr::with_exposed_provenance_mut::<c_void>(address as usize).cast())
            }
            _ => Err(format!("{bytes} bytes at {address:#x} are not within one allocation")),
        }
    }
}
