//! Which processors have AMX's tiles, and the shapes of tiles.
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, LDTILECFG.

use std::arch::asm;

/// Whether the processor has AMX's products of bytes and of bfloat16, and the operating system lets this process use them:
/// asks it to.
pub(super) fn available() -> bool {
    // Linux saves tiles only for processes that asked for them.
    cfg!(target_os = "linux") && is_x86_feature_detected!("avx512bf16") && has_tiles() && request_permission()
}

fn has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    const ALL: u32 = AMX_BF16 | AMX_TILE | AMX_INT8;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & ALL == ALL
}

fn request_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: i64;
    // SAFETY: the call takes two numbers and touches no memory of the program.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Tiles a thread has.
const TILES: usize = 8;

/// The shapes of the eight tiles, as LDTILECFG reads them.
#[repr(C, align(64))]
pub(crate) struct TileShapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_a_row: [u16; 16],
    rows: [u8; 16],
}

impl TileShapes {
    /// Tiles without rows.
    pub(crate) fn new() -> Self {
        Self { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_a_row: [0; 16], rows: [0; 16] }
    }

    /// Gives `tile` up to 16 rows of up to 64 bytes, a multiple of 4.
    pub(crate) fn set(&mut self, tile: usize, rows: usize, bytes_of_a_row: usize) {
        debug_assert!(tile < TILES && (1..=16).contains(&rows));
        debug_assert!((4..=64).contains(&bytes_of_a_row) && bytes_of_a_row.is_multiple_of(4));
        self.rows[tile] = rows as u8;
        self.bytes_of_a_row[tile] = bytes_of_a_row as u16;
    }

    /// Gives this thread tiles of these shapes, all zeros, until the result is dropped.
    ///
    /// # Safety
    /// [`available`] said so. The thread has no other tiles now, and uses none after the result is dropped.
    pub(crate) unsafe fn load(&self) -> LoadedTiles {
        // SAFETY: the shapes are valid (`set`), and the system saves tiles for this process.
        unsafe { asm!("ldtilecfg [{}]", in(reg) std::ptr::from_ref(self), options(nostack, readonly)) };
        LoadedTiles(())
    }
}

/// The tiles of a thread.
pub(crate) struct LoadedTiles(());

impl Drop for LoadedTiles {
    fn drop(&mut self) {
        // SAFETY: no tile is used behind this, by the promise given to `load`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
