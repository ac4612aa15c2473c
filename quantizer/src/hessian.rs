//! The Hessian of a linear layer's squared output error: what its inputs have in common.
//!
//! ```text
//! H[i, j] = sum over calibration tokens of x[i] * x[j]          x [inputs]
//! |(W - Wq) X|^2 = sum over outputs n of d[n] H d[n]^T          d = W - Wq
//! ```
//!
//! Sums are in `f32`, one token block after the other; the factorization is in `f64`. The order of sums
//! depends on the shapes alone, so that results do not depend on the number of threads.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltParams, LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, Mat, MatRef, Par, Spec};

/// Rows of a weight matrix whose error is computed at once.
const ERROR_ROWS: usize = 256;

/// `X^T X`, symmetric.
pub(crate) struct Hessian {
    sums: Mat<f32>,
}

/// Sums a [`Hessian`].
pub(crate) struct HessianSum {
    sums: Mat<f32>,
}

impl HessianSum {
    /// Of no tokens.
    pub(crate) fn new(inputs: usize) -> Self {
        Self { sums: Mat::zeros(inputs, inputs) }
    }

    /// Adds tokens: `values` is row-major `[tokens, inputs]`.
    pub(crate) fn add(&mut self, values: &[f32], par: Par) {
        let inputs = self.sums.nrows();
        let rows = MatRef::from_row_major_slice(values, values.len() / inputs.max(1), inputs);
        triangular::matmul(
            self.sums.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            rows.transpose(),
            BlockStructure::Rectangular,
            rows,
            BlockStructure::Rectangular,
            1.0,
            par,
        );
    }

    /// The sum, both triangles.
    pub(crate) fn finish(mut self) -> Hessian {
        let inputs = self.sums.nrows();
        for column in 0..inputs {
            for row in 0..column {
                self.sums[(row, column)] = self.sums[(column, row)];
            }
        }
        Hessian { sums: self.sums }
    }
}

impl Hessian {
    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.sums.nrows()
    }

    /// `H[input, input]`.
    pub(crate) fn diagonal(&self, input: usize) -> f32 {
        self.sums[(input, input)]
    }

    /// The mean of the diagonal, 1 where that is 0: what damping is a fraction of.
    pub(crate) fn mean_diagonal(&self) -> f64 {
        let sum: f64 = (0..self.inputs()).map(|input| f64::from(self.diagonal(input))).sum();
        if sum > 0.0 { sum / self.inputs() as f64 } else { 1.0 }
    }

    /// Rows `first..end`, all columns.
    pub(crate) fn rows(&self, first: usize, end: usize) -> MatRef<'_, f32> {
        self.sums.as_ref().subrows(first, end - first)
    }

    /// Rows and columns `first..end`, row-major, with `added` on the diagonal.
    pub(crate) fn block(&self, first: usize, end: usize, added: f32) -> Vec<f32> {
        let element =
            |row: usize, column: usize| self.sums[(row, column)] + if row == column { added } else { 0.0 };
        (first..end).flat_map(|row| (first..end).map(move |column| element(row, column))).collect()
    }

    /// The upper triangular `U`, row-major `[inputs, inputs]`, with `U^T U = (H' + damping * mean * I)^-1`,
    /// where `H'` has the inputs in the given `order` and `mean` is [`Self::mean_diagonal`]. `None` when the damped matrix is not positive definite.
    ///
    /// With `H' = R R^T` for an upper triangular `R` (the Cholesky factor of the reversed matrix, reversed
    /// again), `U` is `R^-1`: one factorization and one triangular inverse.
    pub(crate) fn inverse_factor(&self, order: &[usize], damping: f64, par: Par) -> Option<Vec<f32>> {
        let inputs = self.inputs();
        let mean = self.mean_diagonal();
        let reversed = |index: usize| order[inputs - 1 - index];
        let mut factor = Mat::<f64>::zeros(inputs, inputs);
        for column in 0..inputs {
            for row in column..inputs {
                factor[(row, column)] = f64::from(self.sums[(reversed(row), reversed(column))]);
            }
            factor[(column, column)] += damping * mean;
        }
        let params: Spec<LltParams, f64> = Spec::default();
        let mut scratch = MemBuffer::new(cholesky_in_place_scratch::<f64>(inputs, par, params));
        let stack = MemStack::new(&mut scratch);
        cholesky_in_place(factor.as_mut(), LltRegularization::default(), par, stack, params).ok()?;
        let mut inverse = Mat::<f64>::zeros(inputs, inputs);
        invert_lower_triangular(inverse.as_mut(), factor.as_ref(), par);
        drop(factor);
        let mut upper = vec![0.0; inputs * inputs];
        for (row, upper) in upper.chunks_exact_mut(inputs.max(1)).enumerate() {
            for column in row..inputs {
                let value = inverse[(inputs - 1 - row, inputs - 1 - column)] as f32;
                if !value.is_finite() {
                    return None;
                }
                upper[column] = value;
            }
        }
        Some(upper)
    }

    /// What each input has of the sum over rows of `d H d^T`: `d[i] * (H d^T)[i]`, summed over rows. `rows` is
    /// row-major `[any, inputs]`. The part of an input whose error makes up for that of others is negative.
    pub(crate) fn energy_by_input(&self, rows: &[f32], par: Par) -> Vec<f64> {
        let inputs = self.inputs();
        let mut products = vec![0.0f32; ERROR_ROWS.min(rows.len() / inputs.max(1)) * inputs];
        let mut energies = vec![0.0; inputs];
        for rows in rows.chunks(ERROR_ROWS * inputs.max(1)) {
            let count = rows.len() / inputs;
            let products = &mut products[..rows.len()];
            matmul(
                faer::MatMut::from_row_major_slice_mut(products, count, inputs),
                Accum::Replace,
                MatRef::from_row_major_slice(rows, count, inputs),
                self.sums.as_ref(),
                1.0,
                par,
            );
            for (rows, products) in rows.chunks_exact(inputs).zip(products.chunks_exact(inputs)) {
                for ((energy, &d), &p) in energies.iter_mut().zip(rows).zip(products) {
                    *energy += f64::from(d) * f64::from(p);
                }
            }
        }
        energies
    }
}
