//! The running softmax of the query rows of a task: for each row the sums of weighted values, the largest score so far and
//! the total of the weights.

use std::mem::MaybeUninit;

use super::products::GROUP_KEYS;
use crate::device::cpu::simd::Simd;

/// Values of a row's state behind its `head_dim` sums: the largest score, the total, and room up to a whole vector.
pub(super) const STATE_TAIL: usize = 16;

/// Memory for up to `N` values of a task, of which only those in use are written.
pub(super) struct Scratch<const N: usize>([MaybeUninit<f32>; N]);

impl<const N: usize> Scratch<N> {
    pub(super) fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; N])
    }

    /// The first `length` values, set to 0.
    pub(super) fn zeroed(&mut self, length: usize) -> &mut [f32] {
        let values = &mut self.0[..length];
        values.fill(MaybeUninit::new(0.0));
        // SAFETY: all of them were just written, and `MaybeUninit<f32>` lies in memory as `f32` does.
        unsafe { &mut *(std::ptr::from_mut(values) as *mut [f32]) }
    }
}

/// `[row, head_dim + STATE_TAIL]`.
pub(super) struct State<'a> {
    values: &'a mut [f32],
    head_dim: usize,
}

impl<'a> State<'a> {
    pub(super) fn new(values: &'a mut [f32], head_dim: usize) -> Self {
        Self { values, head_dim }
    }

    /// Values from one row to the next.
    fn stride(&self) -> usize {
        self.head_dim + STATE_TAIL
    }

    /// No key was seen.
    pub(super) fn clear(&mut self) {
        self.values.fill(0.0);
        let (head_dim, stride) = (self.head_dim, self.stride());
        for row in self.values.chunks_exact_mut(stride) {
            row[head_dim] = f32::NEG_INFINITY;
        }
    }

    /// The rows from `row` on, [`STATE_TAIL`] more than their sums apart.
    pub(super) fn rows(&mut self, row: usize) -> &mut [f32] {
        let stride = self.stride();
        &mut self.values[row * stride..]
    }

    /// Turns the scores of a row and a group into weights against the running maximum, and rescales what was summed
    /// before.
    ///
    /// # Safety
    /// The instruction set of `S` is available.
    #[inline(always)]
    pub(super) unsafe fn soften<S: Simd>(&mut self, row: usize, scores: &mut [f32], visible: Visible) {
        if visible.first >= visible.end {
            scores.fill(0.0);
            return;
        }
        scores[..visible.first].fill(f32::NEG_INFINITY);
        scores[visible.end..].fill(f32::NEG_INFINITY);
        let head_dim = self.head_dim;
        let (sums, tail) = self.rows(row).split_at_mut(head_dim);
        let [before, total, ..] = tail else { return };
        // SAFETY: the row has whole vectors of scores, and sums of `head_dim`, a multiple of the width.
        unsafe {
            let mut largest = S::splat(*before);
            for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
                largest = S::max(largest, S::load(scores[start..].as_ptr()));
            }
            let largest = S::largest(largest);
            for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
                let score = S::load(scores[start..].as_ptr());
                S::store(scores[start..].as_mut_ptr(), S::exp(S::sub(score, S::splat(largest))));
            }
            scores[..visible.first].fill(0.0);
            scores[visible.end..].fill(0.0);
            let mut of_group = S::splat(0.0);
            for start in (0..GROUP_KEYS).step_by(S::WIDTH) {
                of_group = S::add(of_group, S::load(scores[start..].as_ptr()));
            }
            if largest > *before {
                let factor = S::exp(S::splat(*before - largest));
                scale::<S>(sums, factor);
                *total *= S::largest(factor);
                *before = largest;
            }
            *total += S::sum(of_group);
        }
    }

    /// Adds the state of the keys that come next: rows that saw none of them stay as they are.
    ///
    /// # Safety
    /// The instruction set of `S` is available.
    #[inline(always)]
    pub(super) unsafe fn merge<S: Simd>(&mut self, next: &State<'_>) {
        let (head_dim, stride) = (self.head_dim, self.stride());
        let rows = self.values.chunks_exact_mut(stride).zip(next.values.chunks_exact(stride));
        for (row, next) in rows {
            let (before, after) = (row[head_dim], next[head_dim]);
            if after == f32::NEG_INFINITY {
                continue;
            }
            if before == f32::NEG_INFINITY {
                row.copy_from_slice(next);
                continue;
            }
            let largest = before.max(after);
            // SAFETY: rows have whole vectors of sums.
            unsafe {
                let of_row = S::exp(S::splat(before - largest));
                let of_next = S::exp(S::splat(after - largest));
                for start in (0..head_dim).step_by(S::WIDTH) {
                    let sum = row[start..].as_mut_ptr();
                    let scaled = S::mul(S::load(sum), of_row);
                    S::store(sum, S::multiply_add(S::load(next[start..].as_ptr()), of_next, scaled));
                }
                row[head_dim] = largest;
                row[head_dim + 1] =
                    row[head_dim + 1] * S::largest(of_row) + next[head_dim + 1] * S::largest(of_next);
            }
        }
    }

    /// Writes the output of a row.
    pub(super) fn write(&self, row: usize, output: &mut [f32]) {
        let values = &self.values[row * self.stride()..];
        let total = values[self.head_dim + 1];
        for (output, sum) in output.iter_mut().zip(values) {
            *output = sum / total;
        }
    }
}

#[inline(always)]
unsafe fn scale<S: Simd>(sums: &mut [f32], factor: S::F32) {
    for start in (0..sums.len()).step_by(S::WIDTH) {
        // SAFETY: `sums` is whole vectors.
        unsafe {
            let sum = sums[start..].as_mut_ptr();
            S::store(sum, S::mul(S::load(sum), factor));
        }
    }
}

/// The keys of a group that a query sees: offsets `first..end`.
#[derive(Clone, Copy)]
pub(super) struct Visible {
    first: usize,
    end: usize,
}

impl Visible {
    /// Of the group from key `first_key` on, for a query at `position`.
    pub(super) fn new(position: usize, window: usize, first_key: usize) -> Self {
        let oldest = (position + 1).saturating_sub(window);
        Self {
            first: oldest.saturating_sub(first_key).min(GROUP_KEYS),
            end: (position + 1).saturating_sub(first_key).min(GROUP_KEYS),
        }
    }
}
