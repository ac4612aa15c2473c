//! How the codes of a quantized matrix are packed in panels.
//!
//! ```text
//! nibbles    up to 4 bits   [panel, step, 32]      eight inputs, a step, to a word (the order GPTQ files use)
//! five bits  5 bits         nibbles, and [panel, 4 steps, 32] words of the fifth bits of 32 inputs
//! words      6 to 8 bits    [panel, step, 2, 32]   of each eight inputs 0, 2, 4 and 6, then 1, 3, 5 and 7
//! bytes      up to 8 bits   [panel, input, 32]     for groups that no step of eight inputs fits
//! ```

use super::aligned::{AlignedVec, prefetch_bytes};
use super::matrix::{PANEL_COLUMNS, pack};
use super::simd::Simd;
use super::thread_pool::ThreadPool;
use super::tile::{ByteColumns, Columns, FiveBitColumns, NibbleColumns, WordColumns};
use crate::tensor::QuantizedMatrix;

/// Inputs of a step: the nibbles of a word.
pub(super) const STEP: usize = 8;
/// Steps whose fifth bits are in one word.
pub(super) const STEPS_OF_FIFTH_BITS: usize = 4;
/// Bytes of a word for each column of a panel.
const PANEL_BYTES: usize = PANEL_COLUMNS * size_of::<u32>();

/// The packed codes of a matrix.
pub(crate) trait Codes: Clone + Sync {
    /// A chunk of a panel, `V` vectors wide.
    type Chunk<S: Simd, const V: usize>: Columns<S>;

    /// Packs the codes of `matrix` on all threads of `pool`.
    fn pack(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self;
    fn bytes(&self) -> usize;
    /// The chunk at `place`, each code times `factors` plus `offsets`.
    ///
    /// # Safety
    /// As for [`super::matrix::Panels::chunk`].
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        place: Place,
        factors: [S::F32; V],
        offsets: [S::F32; V],
    ) -> Self::Chunk<S, V>;
}

/// Codes in steps of eight inputs, which can be multiplied as integers.
pub(crate) trait IntegerCodes: Codes {
    /// The codes of inputs 0, 2, 4 and 6 of step `step` from `place` on, and those of 1, 3, 5 and 7, a byte each.
    ///
    /// # Safety
    /// As for [`super::matrix::Panels::chunk`] with one vector; the chunk has that step.
    unsafe fn step<S: Simd>(&self, place: Place, step: usize) -> [S::U32; 2];
    /// Whether no code is above 15.
    const FOUR_BITS: bool = false;

    /// Asks for the codes of `steps` steps from `place` on, which may lie behind the panel.
    fn prefetch(&self, place: Place, steps: usize);
    /// `sum` and the products of such codes and of activations.
    ///
    /// # Safety
    /// The instruction set of `S` is available.
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32;
}

/// Where a chunk begins in a matrix of `inputs` inputs.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(super) inputs: usize,
    pub(super) panel: usize,
    pub(super) start: usize,
    pub(super) column: usize,
}

impl Place {
    /// The element in `[panel, rows, 32]`, `row` rows into the panel.
    fn at(self, rows: usize, row: usize) -> usize {
        (self.panel * rows + row) * PANEL_COLUMNS + self.column
    }
}

/// Codes of up to four bits.
#[derive(Clone)]
pub(crate) struct Nibbles {
    words: AlignedVec<u32>,
}

/// Codes of five bits: `high` holds the fifth bits of four steps; those of step `s` are bits `s` (inputs 0, 2, 4
/// and 6 of it) and `4 + s` (inputs 1, 3, 5 and 7) of the word's bytes.
#[derive(Clone)]
pub(crate) struct FiveBits {
    nibbles: Nibbles,
    high: AlignedVec<u32>,
}

/// Codes of up to `BITS` bits, a byte each, for groups that steps fit. 7 bits and less need one dot product on
/// processors that sum pairs of products in 16 bits, 8 bits two.
#[derive(Clone)]
pub(crate) struct Words<const BITS: u32> {
    words: AlignedVec<u32>,
}

/// Codes of up to eight bits, a byte each, for any groups.
#[derive(Clone)]
pub(crate) struct Bytes {
    codes: AlignedVec<u8>,
}

/// The codes of an output from input `first` on, at most `length`.
fn codes(matrix: &QuantizedMatrix, output: usize, first: usize, length: usize) -> &[u8] {
    let inputs = matrix.in_features();
    &matrix.codes()[output * inputs..][first..inputs.min(first + length)]
}

/// The codes of a step of an output, a byte each from the lowest on; zeros behind the last input.
fn codes_of_step(matrix: &QuantizedMatrix, output: usize, step: usize) -> u64 {
    let codes = codes(matrix, output, step * STEP, STEP);
    let mut bytes = [0; STEP];
    match codes.first_chunk() {
        Some(whole) => bytes = *whole,
        None => bytes[..codes.len()].copy_from_slice(codes),
    }
    u64::from_le_bytes(bytes)
}

/// Bytes 0, 2, 4 and 6.
fn even_bytes(bytes: u64) -> u32 {
    let bytes = bytes & 0x00ff_00ff_00ff_00ff;
    let pairs = (bytes | bytes >> 8) & 0x0000_ffff_0000_ffff;
    (pairs | pairs >> 16) as u32
}

/// The low four bits of eight bytes.
fn low_nibbles(bytes: u64) -> u32 {
    let bytes = bytes & 0x0f0f_0f0f_0f0f_0f0f;
    even_bytes(bytes | bytes >> 4)
}

impl Codes for Nibbles {
    type Chunk<S: Simd, const V: usize> = NibbleColumns<S, V>;

    fn pack(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        let steps = matrix.in_features().div_ceil(STEP);
        let word = |output: usize, step: usize| low_nibbles(codes_of_step(matrix, output, step));
        Self { words: pack(matrix.out_features(), steps, pool, word) }
    }

    fn bytes(&self) -> usize {
        self.words.bytes()
    }

    #[inline(always)]
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        place: Place,
        factors: [S::F32; V],
        offsets: [S::F32; V],
    ) -> Self::Chunk<S, V> {
        let from = self.words[place.at(place.inputs.div_ceil(STEP), place.start / STEP)..].as_ptr();
        NibbleColumns { from, stride: PANEL_COLUMNS, factors, offsets }
    }
}

impl IntegerCodes for Nibbles {
    const FOUR_BITS: bool = true;

    #[inline(always)]
    fn prefetch(&self, place: Place, steps: usize) {
        let at = place.at(place.inputs.div_ceil(STEP), place.start / STEP);
        prefetch_bytes(self.words.as_ptr().wrapping_add(at), steps * PANEL_BYTES);
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&self, place: Place, step: usize) -> [S::U32; 2] {
        let at = place.at(place.inputs.div_ceil(STEP), place.start / STEP + step);
        debug_assert!(at + S::WIDTH <= self.words.len());
        // SAFETY: the caller's promise; the panel holds the words of that step.
        unsafe { S::nibbles(S::load_u32(self.words.as_ptr().add(at))) }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe { S::dot(sum, codes, activations) }
    }
}

impl Codes for FiveBits {
    type Chunk<S: Simd, const V: usize> = FiveBitColumns<S, V>;

    fn pack(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        let words = matrix.in_features().div_ceil(STEP * STEPS_OF_FIFTH_BITS);
        let word = |output: usize, word: usize| {
            let length = STEP * STEPS_OF_FIFTH_BITS;
            let codes = codes(matrix, output, word * length, length).iter().enumerate();
            codes.fold(0, |word, (at, &code)| {
                let (step, input) = (at / STEP, at % STEP);
                word | u32::from(code >> 4) << (input / 2 * 8 + input % 2 * 4 + step)
            })
        };
        Self { nibbles: Nibbles::pack(matrix, pool), high: pack(matrix.out_features(), words, pool, word) }
    }

    fn bytes(&self) -> usize {
        self.nibbles.bytes() + self.high.bytes()
    }

    #[inline(always)]
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        place: Place,
        factors: [S::F32; V],
        offsets: [S::F32; V],
    ) -> Self::Chunk<S, V> {
        let words = place.inputs.div_ceil(STEP * STEPS_OF_FIFTH_BITS);
        // SAFETY: the caller's promise.
        let nibbles = unsafe { self.nibbles.chunk::<S, V>(place, factors, offsets) };
        let high = self.high[place.at(words, 0)..].as_ptr();
        FiveBitColumns { nibbles, high, first_step: place.start / STEP }
    }
}

impl IntegerCodes for FiveBits {
    #[inline(always)]
    fn prefetch(&self, place: Place, steps: usize) {
        self.nibbles.prefetch(place, steps);
        let words = place.inputs.div_ceil(STEP * STEPS_OF_FIFTH_BITS);
        let at = place.at(words, place.start / STEP / STEPS_OF_FIFTH_BITS);
        let rows = steps.div_ceil(STEPS_OF_FIFTH_BITS);
        prefetch_bytes(self.high.as_ptr().wrapping_add(at), rows * PANEL_BYTES);
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&self, place: Place, step: usize) -> [S::U32; 2] {
        let index = place.start / STEP + step;
        let words = place.inputs.div_ceil(STEP * STEPS_OF_FIFTH_BITS);
        let at = place.at(words, index / STEPS_OF_FIFTH_BITS);
        debug_assert!(at + S::WIDTH <= self.high.len());
        // SAFETY: the caller's promise; the panel holds the words of that step.
        unsafe {
            let low = self.nibbles.step::<S>(place, step);
            let high = S::load_u32(self.high.as_ptr().add(at));
            let high = S::fifth_bits(high, (index % STEPS_OF_FIFTH_BITS) as u32);
            [S::or(low[0], high[0]), S::or(low[1], high[1])]
        }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe { S::dot(sum, codes, activations) }
    }
}

impl<const BITS: u32> Codes for Words<BITS> {
    type Chunk<S: Simd, const V: usize> = WordColumns<S, V>;

    fn pack(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        let words = matrix.in_features().div_ceil(STEP) * 2;
        let word = |output: usize, word: usize| {
            let (step, odd) = (word / 2, word % 2);
            even_bytes(codes_of_step(matrix, output, step) >> (8 * odd))
        };
        Self { words: pack(matrix.out_features(), words, pool, word) }
    }

    fn bytes(&self) -> usize {
        self.words.bytes()
    }

    #[inline(always)]
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        place: Place,
        factors: [S::F32; V],
        offsets: [S::F32; V],
    ) -> Self::Chunk<S, V> {
        let from = self.words[place.at(place.inputs.div_ceil(STEP) * 2, place.start / STEP * 2)..].as_ptr();
        WordColumns { from, stride: PANEL_COLUMNS, factors, offsets }
    }
}

impl<const BITS: u32> IntegerCodes for Words<BITS> {
    #[inline(always)]
    fn prefetch(&self, place: Place, steps: usize) {
        let at = place.at(place.inputs.div_ceil(STEP) * 2, place.start / STEP * 2);
        prefetch_bytes(self.words.as_ptr().wrapping_add(at), 2 * steps * PANEL_BYTES);
    }

    #[inline(always)]
    unsafe fn step<S: Simd>(&self, place: Place, step: usize) -> [S::U32; 2] {
        let at = place.at(place.inputs.div_ceil(STEP) * 2, (place.start / STEP + step) * 2);
        debug_assert!(at + PANEL_COLUMNS + S::WIDTH <= self.words.len());
        // SAFETY: the caller's promise; the panel holds the words of that step.
        unsafe {
            let from = self.words.as_ptr().add(at);
            [S::load_u32(from), S::load_u32(from.add(PANEL_COLUMNS))]
        }
    }

    #[inline(always)]
    unsafe fn dot<S: Simd>(sum: S::I32, codes: S::U32, activations: i32) -> S::I32 {
        // SAFETY: the caller's promise.
        unsafe {
            if BITS < 8 { S::dot(sum, codes, activations) } else { S::dot_bytes(sum, codes, activations) }
        }
    }
}

impl Codes for Bytes {
    type Chunk<S: Simd, const V: usize> = ByteColumns<S, V>;

    fn pack(matrix: &QuantizedMatrix, pool: &ThreadPool) -> Self {
        let (inputs, codes) = (matrix.in_features(), matrix.codes());
        let value = |output: usize, input: usize| codes[output * inputs + input];
        Self { codes: pack(matrix.out_features(), inputs, pool, value) }
    }

    fn bytes(&self) -> usize {
        self.codes.bytes()
    }

    #[inline(always)]
    unsafe fn chunk<S: Simd, const V: usize>(
        &self,
        place: Place,
        factors: [S::F32; V],
        offsets: [S::F32; V],
    ) -> Self::Chunk<S, V> {
        let from = self.codes[place.at(place.inputs, place.start)..].as_ptr();
        ByteColumns { from, stride: PANEL_COLUMNS, factors, offsets }
    }
}
